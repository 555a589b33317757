"""One file a command: `run(arguments) -> exit code`. `vtfast.cli` lists them."""
