"""Fine-tuning: recipe -> data -> loss -> trained parts. Inference never imports this package."""
