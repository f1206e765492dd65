"""Helpers of the export tests: adapters made by PEFT, llama.cpp's quantizer, files compared byte by byte."""

import os

import pytest


@pytest.fixture(scope="session")
def make_adapter():
    """Save a PEFT adapter with random matrices for a base directory; returns the PEFT model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(base, folder, scale=0.05, **changes):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = {"r": 8, "lora_alpha": 16, "target_modules": names, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**(settings | changes)))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, scale)
        model.save_pretrained(folder)
        return model

    return make


@pytest.fixture(scope="session")
def llama_quantize():
    """llama.cpp's own quantizer over a GGUF file; `imatrix` maps tensor names to float32 arrays."""
    import ctypes

    import llama_cpp
    from petool_lite.export.quantize import FILE_TYPES

    from petool_lite.inference.llama_log import quiet

    def run(source, target, file_type, imatrix=None):
        quiet(llama_cpp)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = FILE_TYPES[file_type][0]
        settings.nthread = os.cpu_count()
        if imatrix:
            rows = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
            for row, (name, values) in zip(rows, imatrix.items(), strict=False):
                row.name = name.encode()
                row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                row.size = len(values)
            settings.imatrix = rows
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings) == 0
        return target

    return run


def quiet(*_) -> None:
    pass
