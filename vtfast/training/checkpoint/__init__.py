"""Checkpoints: what a run needs to go on as if it had never stopped, whole on disk or not there at all.

    RUN/checkpoints/step-N/
        config.json, *.safetensors, tokenizer...    a Hugging Face folder; with LoRA the adapters
        resume/
            state.json               step, versions, schedule, counters, what the run began with (`state.State`)
            config.yaml              the settings of the run
            rank-R.safetensors       the rank's part of masters and optimizer state, and its random numbers
            checksums.json           size and SHA-256 of every other file; written last

Parts carry the names of the weights they belong to and their places in them, so any number of ranks can read what
any other number has written. Nothing is pickled: reading a checkpoint of somebody else's runs no code of theirs.
"""

from vtfast.training.checkpoint.find import find_checkpoint, settings_of
from vtfast.training.checkpoint.run_folder import check_output_dir, keep_data, prepare_run_folder
from vtfast.training.checkpoint.save import Saver

__all__ = ["Saver", "check_output_dir", "find_checkpoint", "keep_data", "prepare_run_folder", "settings_of"]
