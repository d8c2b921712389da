"""This package beside other runtimes: same machine, same checkpoint, same token ids, a process each, taking turns."""
