"""What a defence is worth: projections of many images, the figures made of them, and their cache.

`projection` cuts the work into short calls, `metrics` has the figures, `transfer` attacks the bare classifier and
asks what the defence makes of it, `cache` keeps reconstructions on disk, `quality` makes the figures of weight files'
cards, `demonstration` those of ``defgan-fast demo``. Nothing here trains.
"""
