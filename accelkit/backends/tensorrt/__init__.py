"""TensorRT: fx graph -> ONNX file -> engine, built in a process of its own.

job.py           what the build process is told, and what it answers
versions.py      everything that differs between TensorRT 8.6, 10 and 11
worker.py        the build process: ONNX file -> plan
building.py      the parent's side of it
timing_cache.py  what TensorRT measured of each layer, on disk
"""
