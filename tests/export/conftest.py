"""Helpers of the export tests: adapters made by PEFT, llama.cpp's quantizer, files compared byte by byte."""

import os

import pytest


@pytest.fixture(scope="session")
def make_adapter():
    """Save a PEFT adapter with random matrices for a base directory; returns the PEFT model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(base, folder, scale=0.05):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
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

    import gguf
    import llama_cpp

    from petool_lite.inference.llama_open import quiet

    def run(source, target, file_type, imatrix=None):
        quiet(llama_cpp)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"]
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


@pytest.fixture(scope="session")
def small(tiny_model, llama3_tokenizer):
    """A tiny base with a tokenizer like Llama 3's."""
    return tiny_model(llama3_tokenizer)


@pytest.fixture(scope="session")
def tuned(small, make_adapter, tmp_path_factory):
    """The tiny base, the folder of an adapter for it, and the merged model."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    return small, folder, make_adapter(small, folder).merge_and_unload()


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """A run directory around what was trained: its folder, the base's name, its place, and changes of the recipe."""
    import json
    import shutil

    from petool_lite.prompt.render import LAYOUTS
    from petool_lite.recipe import load_recipe, to_toml

    def make(trained, base, *settings, name=None, **data):
        run = tmp_path_factory.mktemp("run")
        own = [f"model.base={name or base}", "data.train=demo:train:8", "bench.max_reply_tokens=8"]
        recipe = load_recipe("demo", [*own, "model.max_tokens=4096", *settings])[1]
        (run / "recipe.toml").write_text(to_toml(recipe))
        shutil.copytree(trained, run / trained.name)
        config = run / trained.name / "adapter_config.json"
        if config.is_file():
            named = {"base_model_name_or_path": str(name or base)}
            config.write_text(json.dumps(json.loads(config.read_text()) | named))
        manifest = {
            "base": {"name": str(name or base), "directory": str(base), "gguf": None},
            "prompt_style": recipe.data.style, "prompt_layout": LAYOUTS[recipe.data.style], "setting": "rating",
            "data": {"source": "demo:train:8", "sha256": "0", "kept": 8, "tokens": 100} | data,
        }  # fmt: skip
        (run / "manifest.json").write_text(json.dumps(manifest))
        return run

    return make
