"""Checkpoints: everything that a run needs to continue as if it had never stopped. One is whole on disk or not there.

Start reading at `checkpointer.py` (what a checkpoint holds), `save.py` (how it is written), `resume.py` (how it is
restored).

    RUN/checkpoints/step-N/
        config.json, *.safetensors, tokenizer...    a Hugging Face folder; with LoRA the adapters
        resume/
            state.json               step, versions, schedule, counters, what the run started from (`state.State`)
            config.yaml              the settings of the run
            rank-R.safetensors       the rank's part of master weights and optimizer state, and its random state
            checksums.json           size and SHA-256 of every other file; written last

The parts are stored by weight name and offset, so any number of ranks can read what any other number has written.
Nothing is pickled: reading somebody else's checkpoint runs none of their code.
"""

from vtfast.training.checkpoint.find import find_checkpoint, settings_of
from vtfast.training.checkpoint.run_folder import check_output_dir, keep_data, prepare_run_folder
from vtfast.training.checkpoint.save import Saver

__all__ = ["Saver", "check_output_dir", "find_checkpoint", "keep_data", "prepare_run_folder", "settings_of"]
