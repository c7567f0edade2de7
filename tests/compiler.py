"""Compiling takes most of the tests' time, for programs that run for milliseconds."""

QUICK = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'

# What users get, for a test of what the compiler makes: `.compile(compiler_options=USUAL)`.
USUAL = dict(xla_backend_optimization_level=3, xla_cpu_use_fusion_emitters=True)
