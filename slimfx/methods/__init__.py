"""The algorithms: pure functions from tensors to tensors, found here by the name a recipe uses."""

from slimfx.methods.absmax import absmax
from slimfx.methods.full_lora import full_lora
from slimfx.methods.jsq import jsq
from slimfx.methods.l2qer import l2qer
from slimfx.methods.magnitude import magnitude
from slimfx.methods.naive_lora import naive_lora
from slimfx.methods.qera_diagonal import qera_diagonal
from slimfx.methods.slim_histogram import slim_histogram
from slimfx.methods.slim_lora import slim_lora
from slimfx.methods.slim_quant import slim_quant
from slimfx.methods.wanda import wanda

PRUNERS = {"magnitude": magnitude, "wanda": wanda, "jsq": jsq}
"""(weight [N, K], stats) -> score [N, K]; the largest stay (`masks.keep`)."""

QUANTIZERS = {"absmax": absmax, "slim-quant": slim_quant, "slim-histogram": slim_histogram}
"""(weight [N, K], bits=, granularity=, group=) -> bfloat16 scale."""

COMPENSATORS = {
    "naive": naive_lora,
    "l2qer": l2qer,
    "qera": qera_diagonal,
    "slim-lora": slim_lora,
    "full": full_lora,
}
"""(error [N, K], stats, rank=, fast=) -> L [r, K], R [N, r]."""
