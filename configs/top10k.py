"""The recipe: TinyStories, a 10,000-token vocabulary of its own, a 22.75 M-parameter Llama-shaped decoder.

    python scripts/train.py --config configs/top10k.py --workdir runs/top10k

Hardware: one CUDA GPU from Ampere on; 5 epochs of 470 M tokens are 3.4e17 FLOPs, 18.5 minutes of an H200 at the rate of
its training step there (docs/benchmarks.md). Any field is overridden by --config.SECTION.FIELD=VALUE. Goal: a
validation loss below 2.0 nats per token, not measured yet; docs/recipe.md says what has been measured and how.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # initial parameters, order of blocks, dropout, samples
            "data": {
                "source": "hub",  # hub: the Hugging Face Hub; files: local files; sample: the bundled made-up stories
                "hub_name": "roneneldan/TinyStories",  # OWNER/NAME; splits train and validation, column text
                "hub_revision": "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",  # commit: the data cannot change
                "train_files": "",  # for files: comma-separated paths or globs of .txt, .jsonl, .parquet
                "valid_files": "",  # likewise
                "max_stories": 0,  # stories of the training split to use; 0 is all. Validation is always whole
                "cache_dir": "cache",  # folder of trained tokenizers and token caches, shared by all runs
                "sequence_length": 512,  # tokens of context; most stories are under 300
            },
            "tokenizer": {
                "path": "",  # a ready tokenizer.json (or its folder); empty: train one
                "vocab_size": 10_000,  # tokens; what a corpus of small words fills, and a third of the usual embedding
                "max_samples": 100_000,  # stories to train the tokenizer on; 0 is all. More changes hardly a merge
                "source": "stories",  # what to train on: stories (the training split), hub or files (other text)
                "hub_name": "",  # for source hub: OWNER/NAME
                "hub_subset": "",  # for source hub: the data set's configuration, if it has several
                "hub_revision": "",  # for source hub: commit
                "train_files": "",  # for source files: comma-separated paths or globs
            },
            "model": {
                "d_model": 448,  # width; 7 heads of 64, the width that flash attention likes
                "num_layers": 7,  # decoder layers
                "num_heads": 7,  # query heads
                "num_kv_heads": 0,  # key/value heads; 0: as many as query heads
                "d_ff": 1344,  # feed-forward width, 3 x d_model
                "rope_theta": 10_000.0,  # base of the rotary angles, as Llama
                "tie_embeddings": True,  # output matrix = embedding: saves 4.5 M of 27 M parameters
                "dropout": 0.0,  # rate; for few stories that are seen many times, not for 470 M tokens seen five times
                "dtype": "bfloat16",  # of activations; parameters, logits and softmax are float32
                "remat": False,  # recompute activations in the backward pass: less memory, about a quarter slower
            },
            "train": {
                "batch_size": 64,  # rows of a micro-batch
                "grad_accum_steps": 4,  # micro-steps an update: 64 x 4 x 512 = 131,072 tokens an update
                "num_epochs": 5,  # passes over the training split
                "max_updates": 0,  # updates; 0: from num_epochs
                "article_loss_weight": 1.0,  # weight of targets that are a / an / the; 1 is plain cross-entropy
            },
            "optim": {
                "learning_rate": 5e-4,  # peak
                "min_learning_rate": 5e-5,  # at the last update
                "warmup_updates": 500,  # linear from 0 to the peak
                "weight_decay": 0.1,  # on matrices only
                "beta1": 0.9,  # AdamW
                "beta2": 0.95,  # AdamW; shorter memory than 0.999, as usual for language models
                "max_grad_norm": 1.0,  # global norm at which the averaged gradient is clipped
                "muon_learning_rate": 0.0,  # peak of Muon, which then moves the layers' matrices; 0: AdamW moves all
                "muon_momentum": 0.95,  # of Muon; unused without it
            },
            "eval": {
                "every": 500,  # updates between evaluations
                "max_batches": 0,  # validation batches; 0: the whole split
                "early_stopping_patience": 0,  # evaluations without a better loss before stopping; 0: never
            },
            "checkpoint": {
                "every": 500,  # updates between checkpoints; the best, and of epochs up to 20, are kept besides
                "keep": 2,  # latest checkpoints kept
            },
            "sample": {
                "prompts": ("Once upon a time there was", "One day, a little girl", "Tom had a"),  # four stories each
                "max_new_tokens": 256,  # per sampled story
                "temperature": 0.8,  # 0 is greedy
            },
            "logging": {
                "every": 10,  # updates between looks at the device
                "loss_spike_factor": 1.5,  # warn of a loss above this times the median of the last 100; 0: never
                "tensorboard": True,  # event files beside metrics.jsonl
            },
        }
    )
