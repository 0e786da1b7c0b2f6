"""The short form of `foreign_code.py`; and that its baits are real and its witnesses awake."""

import ast
import pickle
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from slow.attacks import foreign_code
from slow.attacks.sandbox import ROOT, World
from support import hostile_model as bait

SHORT = ("train", "export", "look by a tower")
BAITS = (  # those that once were taken, and one of every other kind
    "model: pickles_beside", "model: trusting", "model: index_of_pickles", "model: unknown_processor",
    "model: unknown_image_processor", "model: attention_from_the_hub", "model: own_generate", "model: adapter_beside",
    "chat template 0", "chat template 2", "chat template 13", "reference: unknown_model",
    "reference: unknown_tokenizer", "llm: unknown_model", "llm: unknown_tokenizer", "look: unknown_model", "picture",
)  # fmt: skip


@pytest.fixture
def world():
    with tempfile.TemporaryDirectory() as folder:  # pytest's paths are too long for sockets
        yield World(Path(folder).resolve())


def test_nothing_gets_in_or_out(world):
    attacks = [attack for attack in foreign_code.ATTACKS if attack.name in BAITS]
    assert len(attacks) == len(BAITS)
    assert not foreign_code.at_once(world, [*SHORT], attacks)
    if not world.confined:
        pytest.skip("no namespaces here (unshare): seen by Python's hook and by the files, not by the kernel")


UNPICKLE = "__import__('pickle').loads(open(given + '/a.bin', 'rb').read())"
FAULTS = {  # what a process does, and what is seen of it
    "open('/tmp/stray', 'w')": "writes open /tmp/stray",
    "__import__('os').mkdir('stray')": "writes os.mkdir",
    "__import__('pathlib').Path(given, 'new').touch()": "writes open",
    "__import__('socket').getaddrinfo('localhost', 80)": "network",
    "__import__('socket').create_connection(('127.0.0.1', 9))": "network",
    UNPICKLE: "pickle ['builtins', 'exec'] and code of the bait a ran",
    "open(given + '/a.bin', 'rb')": "open",
    "exec(compile(open(given + '/evil.py').read(), given + '/evil.py', 'exec'))": "code ['exec'",
    "__import__('sys').path.insert(0, given) or __import__('evil')": "code ['compile' and code of the bait evil ran",
    "__import__('subprocess').run(['true'])": "starts",
    # Not of Python, or not of this process:
    "__import__('ctypes').CDLL(None).mkdir(b'stray', 0o777)": "cwd/stray is new",
    "__import__('ctypes').CDLL(None).open((tmp + '/leftover').encode(), 0o101, 0o600)": "tmp/leftover was left behind",
    "__import__('subprocess').run([__import__('sys').executable, '-c', 'open(\"/tmp/stray\", \"w\")'])": "writes open",
    "__import__('multiprocessing').Process(target=open, args=('/tmp/stray', 'w')).start()": "writes open",
    f"__import__('multiprocessing').Process(target=exec, args=({UNPICKLE!r}, globals())).start()": "pickle ['builtins'",
}


def test_the_baits_are_real_and_the_witnesses_awake(world):
    (world.given / "a.bin").write_bytes(world.code("a").pickle)
    (world.given / "evil.py").write_text(world.code("evil").python)
    for fault, told in FAULTS.items():
        before, names = world.files(), f"given, tmp = {str(world.given)!r}, {str(world.tmp)!r}"
        world.run(["-c", f"{names}\n{fault}"])
        found = [*world.wrong(), *world.strays(before)]
        for what in told.split(" and "):
            assert any(what in line for line in found), (fault, found)
        for stray in (world.cwd / "stray", world.tmp / "leftover"):
            subprocess.run(["rm", "-rf", stray], check=True)
    Path("/tmp/stray").unlink()


def test_the_kernel_counts_what_no_hook_sees(world):
    if not world.confined:
        pytest.skip("no namespaces here (unshare)")
    for kind, address in (("AF_INET", "192.0.2.1"), ("AF_INET6", "2001:db8::1")):
        unhooked = f"import socket; socket.socket(socket.{kind}, socket.SOCK_DGRAM).sendto(b'x', ('{address}', 53))"
        world.run(["-S", "-c", unhooked])  # without sitecustomize
        (found,) = world.wrong()
        assert found.startswith("the kernel counted 1 ")
    world.run(["-S", "-c", f"open({str(world.given / 'new')!r}, 'w')"])
    assert not (world.given / "new").exists()


def test_a_bait_that_is_opened_leaves_its_canary(tmp_path):
    code = bait.Code(tmp_path / "canary")
    (tmp_path / "file").write_bytes(code.torch_pickle)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=True)
    assert not code.canary.exists()
    torch.load(tmp_path / "file", weights_only=False)
    assert code.canary.exists()


def test_code_of_a_model_is_trusted_nowhere():
    """Whatever could run a model's own code is told not to, in so many words: left out, it means asking."""
    asked = 0
    for file in (file for top in ("tinyspeed", "scale") for file in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            told = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
            assert all(isinstance(value, ast.Constant) and value.value is False for value in told), (file, node.lineno)
            name = ast.unparse(node.func)
            if name.endswith((".from_pretrained", ".from_config")) and not name.startswith(("CLIP", "Llava")):
                assert told, f"{file}, line {node.lineno}: {name} without trust_remote_code=False"
                asked += 1
        assert "torch.load(" not in file.read_text(encoding="utf-8"), file
    assert asked > 10
