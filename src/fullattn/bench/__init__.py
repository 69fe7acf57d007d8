"""The benchmark behind `fullattn bench`: what the layers and their backends cost, side by side.

Data flows one way: `shapes` and `contenders` say what is compared, `workload` builds it, `measure`
takes its time and `memory` its peak, `report` holds the figures, `table`, `plot` and `compare` show
them, and `run` joins the parts. Needs the extra `fullattn[bench]` (rich, matplotlib, pillow).
"""
