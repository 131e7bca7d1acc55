"""What a defence is worth: attacks under a threat, the checks of an evaluation, and projections of many images.

:func:`evaluate` is the door: `threat` says what an attacker may do and knows, `targets` makes the models that he
attacks, `named_attacks` has the attacks with their settings, `attacked_rows` makes and keeps one row, `checks` doubts
the result, `tables` and `report` show it, `detection` measures detectors. `projection` cuts work into short calls,
`metrics` has the figures, `transfer` attacks the bare classifier and asks what the defence makes of it, `cache` keeps
reconstructions on disk, `quality` makes the figures of weight files' cards, `demonstration` those of
``defgan-fast demo``. Nothing here trains.
"""

from defgan_fast.evaluation.evaluations import Evaluation, accuracy_curve, evaluate
from defgan_fast.evaluation.named_attacks import Attack
from defgan_fast.evaluation.threat import Threat

__all__ = ["Attack", "Evaluation", "Threat", "accuracy_curve", "evaluate"]
