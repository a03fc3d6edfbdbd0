"""Predicts the memory and the speed of a run on TPUs before they are rented.

Every program of a training step is compiled for the slice by the TPU compiler, which needs no TPU:

  chips.py       the TPU generations, and the devices of a slice
  step.py        a training step as shapes with shardings
  programs.py    the programs that a step runs
  costs.py       FLOPs and memory traffic from the sizes alone
  hlo_text.py    parses the text of a compiled program
  hlo_loops.py   derives trip counts of loops from it
  hlo.py         derives FLOPs, collectives and kernels from it
  measure.py     compiles the programs: peak memory, least time, the largest sizes that fit
  __main__.py    the command: python -m jaxrl_reason.plan
"""

from jaxrl_reason.plan.chips import devices_of
from jaxrl_reason.plan.measure import find_largest, make_plan
