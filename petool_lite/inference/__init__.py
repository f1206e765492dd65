"""Offline inference: token ids in, reply and timings out. llama.cpp on a CPU lives in `llama`."""
