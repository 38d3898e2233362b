"""Ways to change the weights of a model's folder that no loader may overlook."""

import shutil

import torch
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


def changed(source, target, change, file=FILE):
    """A copy of a folder; `change` gets the stored tensors and may change them in place."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / file)
    change(tensors)
    save_file(tensors, target / file, {"format": "pt"})
    return target


def remove(tensors, name):
    del tensors[name]


def rename(tensors, name):
    tensors["x." + name] = tensors.pop(name)


def reshape(tensors, name):
    tensors[name] = tensors[name][:-1].contiguous()


def widen(tensors, name):
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def as_integers(tensors, name):
    tensors[name] = tensors[name].to(torch.int8)


def as_float8(tensors, name):
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def not_a_number(tensors, name):
    tensors[name].view(-1)[-1] = float("nan")


def infinite(tensors, name):
    tensors[name].view(-1)[0] = float("inf")


def add(tensors, name):
    tensors[name + ".more"] = tensors[name].clone()


CHANGES = [remove, rename, reshape, widen, as_integers, as_float8, not_a_number, infinite, add]
