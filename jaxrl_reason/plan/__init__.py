"""Predicts the memory and the speed of a run on TPUs before they are rented: python -m jaxrl_reason.plan.

`measure` compiles the programs of a training step by the TPU compiler, which needs no TPU, and finds peak memory, least
time and the largest sizes that fit. `chips` knows the TPU generations and the devices of a slice, `step` describes a
step as shapes with shardings, and `programs` lists its programs. `costs` computes FLOPs and memory traffic from the
sizes alone; `hlo` derives FLOPs, collectives and kernels from the text of a compiled program, which `hlo_text` parses,
with the trip counts of its loops from `hlo_loops`.
"""

from jaxrl_reason.plan.chips import devices_of
from jaxrl_reason.plan.measure import find_largest, make_plan
