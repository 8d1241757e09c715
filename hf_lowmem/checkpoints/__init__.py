"""Checkpoints of a killed run: which of them can be trusted.

transformers writes the files of `checkpoint-N` one after the other, in place, and resumes from the highest N that is a
folder. A run killed inside a save leaves a folder with the highest number and half of its files; a full disk, a cut
copy or a flipped bit leave one that looks whole. Here a checkpoint is complete when `lowmem_manifest.json`, which is
written last and renamed into place, lists its files with their sizes and SHA-256, and they agree.

    write_manifest(folder)      after the last file
    verify(folder)              raises BadCheckpoint, naming the file
    check_resumable(folder)     raises BadCheckpoint where a model was saved alone
    last_complete(run)          the newest that a run can go on from, and why the others do not serve
    choose(run, resume)         the one that `resume_from_checkpoint` names; plain words where it cannot be
    begin_run(run, resume)      who the run is that writes the next checkpoints: an output_dir may hold several runs'
    set_aside(folder)           before a save over an existing checkpoint: nothing complete is overwritten in place

A checkpoint without a manifest was written by plain transformers, or its save was not finished. It is taken only where
nothing better exists or the user names it, and only if each of its files is whole as far as its own format can tell:
torch's files are zip archives with checksums, safetensors says how long it is, JSON parses.

Nothing that would be unpickled is trusted, and nothing is unpickled to find out: files.py says which files those are,
archives.py reads torch's archives, opcodes.py what is pickled in them, and known.py lists what that may be.

Why not write into a temporary folder and rename that: transformers decides the folder's name inside its own method, and
under FSDP and DeepSpeed their libraries write into it as well. A marker that comes last works with all of them.
"""

from hf_lowmem.checkpoints.files import MANIFEST, BadCheckpoint
from hf_lowmem.checkpoints.manifest import STATE, check_resumable, read_manifest, verify, write_manifest
from hf_lowmem.checkpoints.resume import choose
from hf_lowmem.checkpoints.runs import ASIDE, begin_run, drop_aside, last_complete, restore_aside, set_aside

__all__ = [
    "ASIDE",
    "MANIFEST",
    "STATE",
    "BadCheckpoint",
    "begin_run",
    "check_resumable",
    "choose",
    "drop_aside",
    "last_complete",
    "read_manifest",
    "restore_aside",
    "set_aside",
    "verify",
    "write_manifest",
]
