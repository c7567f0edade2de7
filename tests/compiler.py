"""Compiling takes most of the tests' time, for programs that run for milliseconds."""

QUICK = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
