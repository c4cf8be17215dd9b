"""How wrong is each attribution method: measured against a simulated truth.

`roofline` says how long a step takes on a GPU, from vLLM's own counts of FLOPs and bytes
(`vllm_work`); `traffic` makes a trace of steps; `truth` is the Shapley value of each step;
`compare` drives the production StepMeter over the trace and measures its errors; `replay` drives
it over a recorded step log; `tables` shows both. Needs numpy and vLLM, and is loaded by the command
`vllm-cost-meter validate` only.
"""
