"""The benchmark behind `fullattn bench`: what the layers and their backends cost, side by side.

`implementations` lists what is compared and builds it, `workload` adds the input, `memory` takes
the peak of one call and `measure` the times; `run` is the loop over shapes. `results` holds the
figures; `table`, `chart` and `compare` show them. Needs the extra `fullattn[bench]`.
"""
