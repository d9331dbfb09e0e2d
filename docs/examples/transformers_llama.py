"""A small Llama on Python's own sources, with transformers' Trainer:

python docs/examples/transformers_llama.py [--kappa 0] [--rho 0.01] [--steps 150]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from lightning_ire import IRE, SAM, SharpnessMonitor
from lightning_ire.integrations.transformers import attach


def texts(length: int) -> list[dict[str, torch.Tensor]]:
    """Pieces of the sources of the json and argparse modules, byte by byte."""
    files = [*sorted(Path(json.__file__).parent.glob("*.py")), Path(argparse.__file__)]
    tokens = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    pieces = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kappa", type=float, default=2.0, help="strength of the boost; 0: none")
    parser.add_argument("--rho", type=float, default=0.0, help="radius of SAM; 0: none")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", default="transformers_llama", help="folder of checkpoints and TensorBoard's logs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )
    data = texts(64)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.output,
            use_cpu=True,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            warmup_steps=10,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=args.steps // 3,
            save_steps=args.steps // 3,
            report_to="tensorboard",
        ),
        train_dataset=data[:-40],
        eval_dataset=data[-40:],
    )
    # The only line that is ours
    attach(
        trainer,
        IRE(
            kappa=args.kappa,
            gamma=0.6,
            start_step=None if args.kappa == 0 else 0.1,
            perturbation=SAM(args.rho) if args.rho else None,
        ),
        sharpness=SharpnessMonitor(every_n_steps=args.steps // 3, every_n_epochs=None, quantities=["trace_fisher"]),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    print(f"kappa {args.kappa:g}, rho {args.rho:g}: {trainer.evaluate()['eval_loss']:.3f} nats per byte")
    print(f"curves: tensorboard --logdir {args.output}")


if __name__ == "__main__":
    main()
