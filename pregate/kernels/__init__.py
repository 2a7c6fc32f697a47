"""The expert FFN, from contract to kernels; beside it `step`, what a step does besides products.

At the top what all share: `reference` (plain-torch truth), `segments` (expert-sorted order of a step's rows), `units`
(what a call runs, and where it lies), `weights` (layouts of experts in slots), `contract` (what an implementation
offers) and `expert_ffn` (which one runs here). Below: `cpu/` and `triton/` implement it, `tools/` time, tune and warm
them up.
"""
