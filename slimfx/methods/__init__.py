"""The algorithms: pure functions from tensors to tensors, found here by the name a recipe uses."""

from slimfx.methods.absmax import absmax
from slimfx.methods.full_lora import full_lora
from slimfx.methods.magnitude import magnitude
from slimfx.methods.naive_lora import naive_lora
from slimfx.methods.slim_histogram import slim_histogram
from slimfx.methods.slim_lora import slim_lora
from slimfx.methods.slim_quant import slim_quant
from slimfx.methods.wanda import wanda

PRUNERS = {"magnitude": magnitude, "wanda": wanda}
"""(weight [N, K], stats, n=, m=) -> mask [N, K] of what stays."""

QUANTIZERS = {"absmax": absmax, "slim-quant": slim_quant, "slim-histogram": slim_histogram}
"""(weight [N, K], bits=, granularity=, group=) -> bfloat16 scale."""

COMPENSATORS = {"naive": naive_lora, "slim-lora": slim_lora, "full": full_lora}
"""(error [N, K], stats, rank=) -> L [r, K], R [N, r]."""
