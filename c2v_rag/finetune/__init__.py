"""Fine-tuning: recipe -> data -> loss -> trained projector and LoRA. Inference never imports this package."""
