"""What the contestants of a training step are called in tables and figures."""

TITLES = {
    "floor": "frozen model",
    "ird": "IRD, clustered mask",
    "ird-random": "IRD, random mask",
    "lora-1": "LoRA, r = 1",
    "lora-8": "LoRA, r = 8",
    "lora-64": "LoRA, r = 64",
    "lora-equal": "LoRA, as many parameters (r ≥ 1)",
    "shira": "SHiRA",
    "supertuning": "Super-Tuning",
    "bitfit": "BitFit",
    "full": "full",
}
