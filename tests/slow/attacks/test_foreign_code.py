"""The short form of `foreign_code.py`, and checks that the traps are real and that the sandbox sees what happens."""

import ast
import os
import pickle
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from slow.attacks import foreign_code
from slow.attacks.sandbox import Sandbox
from support import hostile
from support.runs import ROOT

COMMANDS = ("train", "export", "look by a tower")
TRAPS = (  # those that once worked, and one of every other kind
    "model: pickles_beside", "model: trusting", "model: index_of_pickles", "model: unknown_processor",
    "model: unknown_image_processor", "model: attention_from_the_hub", "model: own_generate", "model: adapter_beside",
    "chat template 0", "chat template 2", "chat template 13", "reference: unknown_model",
    "reference: unknown_tokenizer", "llm: unknown_model", "llm: unknown_tokenizer", "look: unknown_model", "picture",
)  # fmt: skip


@pytest.fixture
def sandbox():
    with tempfile.TemporaryDirectory() as folder:  # pytest's paths are too long for sockets
        yield Sandbox(Path(folder).resolve())


def test_no_foreign_code_runs_and_nothing_leaves(sandbox):
    attacks = [attack for attack in foreign_code.ATTACKS if attack.name in TRAPS]
    assert len(attacks) == len(TRAPS)
    assert not foreign_code.at_once(sandbox, [*COMMANDS], attacks)
    if not sandbox.confined:
        pytest.skip("no namespaces here (unshare): seen by Python's hook and by the files, not by the kernel")


OUTSIDE = Path(tempfile.gettempdir(), f"stray-{os.getpid()}")
UNPICKLE = "__import__('pickle').loads(open(given + '/a.bin', 'rb').read())"
FORBIDDEN = {  # what a process does, and what is seen of it
    f"open('{OUTSIDE}', 'w')": f"writes open {OUTSIDE}",
    "__import__('os').mkdir('stray')": "writes os.mkdir",
    "__import__('pathlib').Path(given, 'new').touch()": "writes open",
    "__import__('socket').getaddrinfo('localhost', 80)": "network",
    "__import__('socket').create_connection(('127.0.0.1', 9))": "network",
    UNPICKLE: "pickle ['builtins', 'exec'] and code of a ran",
    "open(given + '/a.bin', 'rb')": "open",
    "exec(compile(open(given + '/evil.py').read(), given + '/evil.py', 'exec'))": "code ['exec'",
    "__import__('sys').path.insert(0, given) or __import__('evil')": "code ['compile' and code of evil ran",
    "__import__('subprocess').run(['true'])": "starts",
    # Not by Python, or not in this process:
    "__import__('ctypes').CDLL(None).mkdir(b'stray', 0o777)": "cwd/stray is new",
    "__import__('ctypes').CDLL(None).open((tmp + '/leftover').encode(), 0o101, 0o600)": "tmp/leftover was left behind",
    f"__import__('subprocess').run([__import__('sys').executable, '-c', 'open(\"{OUTSIDE}\", \"w\")'])": "writes open",
    f"__import__('multiprocessing').Process(target=open, args=('{OUTSIDE}', 'w')).start()": "writes open",
    f"__import__('multiprocessing').Process(target=exec, args=({UNPICKLE!r}, globals())).start()": "pickle ['builtins'",
}


def test_the_sandbox_sees_what_is_forbidden(sandbox):
    (sandbox.given / "a.bin").write_bytes(sandbox.code("a").pickle)
    (sandbox.given / "evil.py").write_text(sandbox.code("evil").python)
    for script, told in FORBIDDEN.items():
        before, names = sandbox.files(), f"given, tmp = {str(sandbox.given)!r}, {str(sandbox.tmp)!r}"
        sandbox.run(["-c", f"{names}\n{script}"])
        found = [*sandbox.violations(), *sandbox.changes(before)]
        for what in told.split(" and "):
            assert any(what in line for line in found), (script, found)
        for stray in (sandbox.cwd / "stray", sandbox.tmp / "leftover"):
            subprocess.run(["rm", "-rf", stray], check=True)
    OUTSIDE.unlink()


def test_the_kernel_counts_what_no_hook_sees(sandbox):
    if not sandbox.confined:
        pytest.skip("no namespaces here (unshare)")
    for kind, address in (("AF_INET", "192.0.2.1"), ("AF_INET6", "2001:db8::1")):
        unhooked = f"import socket; socket.socket(socket.{kind}, socket.SOCK_DGRAM).sendto(b'x', ('{address}', 53))"
        sandbox.run(["-S", "-c", unhooked])  # without sitecustomize
        (found,) = sandbox.violations()
        assert found.startswith("the kernel counted 1 ")
    sandbox.run(["-S", "-c", f"open({str(sandbox.given / 'new')!r}, 'w')"])
    assert not (sandbox.given / "new").exists()


def test_a_trap_that_is_opened_leaves_its_canary(tmp_path):
    code = hostile.Code(tmp_path / "canary")
    (tmp_path / "file").write_bytes(code.torch_pickle)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=True)
    assert not code.canary.exists()
    torch.load(tmp_path / "file", weights_only=False)
    assert code.canary.exists()


def test_code_of_a_model_is_trusted_nowhere():
    """Every call that could run a model's own code says not to: without the argument, transformers would ask."""
    asked = 0
    for file in (file for top in ("tinyspeed", "scale") for file in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            told = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
            assert all(isinstance(value, ast.Constant) and value.value is False for value in told), (file, node.lineno)
            name = ast.unparse(node.func)
            if name.endswith((".from_pretrained", ".from_config")) and not name.split(".")[-2].startswith(
                ("CLIP", "Llava")
            ):
                assert told, f"{file}, line {node.lineno}: {name} without trust_remote_code=False"
                asked += 1
        assert "torch.load(" not in file.read_text(encoding="utf-8"), file
    assert asked > 10
