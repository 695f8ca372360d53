"""Writing a LoRA adapter alone: a PEFT directory beside a manifest that states its base model."""

import copy
from pathlib import Path
from typing import Any

from draftsmith.inference.load_adapter import PREFIX, WEIGHTS_FILE
from draftsmith.modules.hf_model import HFModel


def save(model: Any, base: Path, directory: Path) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the base's generation_config.json into `directory`.

    model: the base with the adapters injected (`modules.lora.inject`).
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    arrays = get_peft_model_state_dict(model, save_embedding_layers=False)
    arrays = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in arrays.items()}
    save_file(arrays, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = copy.copy(model.peft_config["default"])
    settings.base_model_name_or_path, settings.inference_mode = str(base.resolve()), True
    settings.save_pretrained(str(directory))  # adapter_config.json
    model.generation_config.save_pretrained(directory)  # when to stop


def restore_base(model: Any, base: Path) -> None:
    """Put the weights that lie on disk, in float32, below the adapters: a reader of the export will have those."""
    stored = dict(HFModel(path=str(base)).build().named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = stored[name.replace(".base_layer", "")].data
