"""Environment of the whole suite: no network, few threads, nothing sent anywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models in tests are tiny: a second thread only waits for the first, and spins while it waits.
os.environ["OMP_NUM_THREADS"] = "1"
