"""Validation: measure the error of each attribution method against a simulated or real truth.

`roofline` gives a step's time on a GPU from vLLM's own counts of FLOPs and bytes (`vllm_work`).
`traffic` makes a trace of steps. `truth` computes the Shapley value of each step. `compare` drives
the production StepMeter over the trace and measures its errors. `replay` drives it over a recorded
step log. `real_server` measures the truth on a real server. `tables` shows the results. The package
needs numpy and vLLM; only the command `vllm-cost-meter validate` loads it.
"""
