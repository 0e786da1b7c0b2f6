"""What torch's FLOP counter does not know: attention on a CPU, of whose pairs a causal one needs half."""

import torch


def halved(q, k, v, dropout=0.0, causal=False, *_, out_shape=None, **__):
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width * (0.5 if causal else 1)


def halved_backward(grad, q, k, v, out, lse, dropout, causal, *_, out_shape=None, **__):
    return 2.5 * halved(q, k, v, dropout, causal)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: halved,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: halved_backward,
}
