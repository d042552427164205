"""Data: pictures and point clouds as arrays, and the endless order in which a run reads them.

Alphabet: B batch, R picture side in pixels, P points, N = R*R pairs of a picture; `values` what the model is
given, `label` the class, `i` an item of a dataset, `k` a position in a run, `res` = R.

| --dataset | domain | what it reads                            | classes                      | item                 |
|-----------|--------|------------------------------------------|------------------------------|----------------------|
| glyphs    | image  | nothing: letters and digits, drawn       | 36                           | uint8 (R,R,3) 0..255 |
| solids    | points | nothing: tables, mugs, ... of triangles  | 7                            | float32 (P,3) -1..1  |
| folder    | image  | a directory of pictures, .zip, lmdb,     | its sub-directories, or none | uint8 (R,R,3) 0..255 |
|           |        | or what `python data.py pack` made of it |                              |                      |
| npz       | image  | one .npz with `images`, perhaps `labels` | its labels, or none          | uint8 (R,R,3) 0..255 |
| shapenet  | points | PointFlow's tree of .npy clouds, .hdf5   | none, or its categories      | float32 (P,3) -1..1  |
| objaverse | points | .npz per object: a cloud and the tokens  | none; conditioned on tokens  | float32 (P,3) -1..1, |
|           |        | of pictures of it                        |                              | float32 (T,C) tokens |

Units: pixels leave `decode_values` in [-1,1]; points are in the units of their own bounding box, which is centred at
the origin with its longest side on [-1,1], y up. Item (i, rng) is a pure function of its arguments, and batch s of a
run a pure function of (dataset, seed, s), so neither resuming nor another number of processes changes what is read.

`python data.py COMMAND` makes sets ready ahead of training: pack, check, stats, sample-meshes, render, tokens.
"""
import argparse
import atexit
import collections
import colorsys
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import warnings
import zipfile

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm


class InputError(ValueError):
    """Something from outside is wrong; the text is one line that names the file or argument and what was expected."""

    def __init__(self, text):
        super().__init__(printable(str(text)))


class EmptySplit(InputError):
    """A set that is there, but not the split of it that was asked for."""


def printable(text):
    """Names from outside may hold newlines, terminal codes or bytes that are no text: those are shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error):
    """An error of a library: its type, then its text, which may quote a whole file."""
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))[:300]}"


def message(error):
    """An error as the user is told it: an OSError by its file and reason (disk full, not a directory, ...), else its text."""
    if isinstance(error, OSError):
        return printable(f"{os.fsdecode(error.filename or 'writing')}: {error.strerror or ' '.join(map(str, error.args))}")
    return printable(" ".join(str(error).split())) or type(error).__name__


# Seeds are tuples, tagged so that no two purposes share a stream. Tags come first: NumPy's SeedSequence pads with
# zeros, so (1, 2) and (1, 2, 0) would be one seed.
ITEM, POINTS, ORDER, SURFACE = 101, 102, 103, 104
SPLITS = {"train": 0, "val": 1, "test": 2}


def split_code(split):
    if split not in SPLITS:
        raise InputError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return SPLITS[split]


# ---------------------------------------------------------------------------------------------------------------------
# Glyphs: an endless picture set that needs no file.

class Glyphs:
    """Letters and digits, dark on pale, one per picture. `item` -> uint8 (R,R,3), label i % 36.

    Everything about item i is drawn in picture units, so another `res` shows the same picture finer or coarser.
    Raises InputError where Pillow has no scalable font.
    """
    needs = "no --data"
    domain = "image"
    HEIGHT = 0.66, 0.84       # of the inked box, in picture heights
    ANGLE = -10.0, 10.0       # degrees
    MARGIN = 0.04             # kept free on every side, in picture widths
    STROKE = 0.05             # added around the outline, in em: regular becomes bold
    PAPER = 0.80, 1.00        # each channel of the background
    SATURATION = 0.75, 1.00
    VALUE = 0.30, 0.65
    LUMA = 0.32               # upper bound of the ink's Rec. 601 luma: yellow must be as readable as blue
    EM = 1024                 # pixels per em of the drawing that all sizes are reduced from
    OVERSAMPLE = 4            # canvas pixels per picture pixel, each way

    def __init__(self, res=32, split="train"):
        self.res, self.split = at_least_one("res", res), split_code(split)
        self.class_names = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
        try:
            scalable = isinstance(ImageFont.load_default(16), ImageFont.FreeTypeFont)
        except (ImportError, OSError, TypeError):     # no FreeType; or Pillow before 10.1, which has no size argument
            scalable = False
        if not scalable:
            raise InputError("glyphs: needs Pillow >= 10.1 built with FreeType support (its built-in scalable font)")

    def __len__(self):
        return 2 ** 20

    def item(self, i, rng=None):
        """rng is not used: a mirrored letter is another letter."""
        return self.render(i), i % len(self.class_names)

    def render(self, i, res=None):
        """Picture i at any resolution, uint8 (res,res,3)."""
        res = res or self.res
        over = max(1, min(self.OVERSAMPLE, self.EM // res))       # a canvas finer than the drawing shows nothing new
        side = over * res
        letter, em, width, height = drawn_letter(self.class_names[i % len(self.class_names)], max(1, self.EM // side))
        u = np.random.default_rng((ITEM, self.split, i)).random(10)

        # size, angle and place, in picture units; the turned box stays inside the margin
        angle = math.radians(between(self.ANGLE, u[0]))
        cos, sin = math.cos(angle), math.sin(angle)
        reach_x = width * cos + height * abs(sin)
        reach_y = height * cos + width * abs(sin)
        room = 1 - 2 * self.MARGIN
        scale = min(between(self.HEIGHT, u[1]) / height, room / max(reach_x, reach_y))       # picture widths per em
        x = 0.5 + (room - scale * reach_x) * (u[2] - 0.5)
        y = 0.5 + (room - scale * reach_y) * (u[3] - 0.5)

        # Pillow wants the map from canvas pixels back to drawing pixels
        step = em / (scale * side)
        a, b = step * cos, step * sin
        c = letter.width / 2 - side * (a * x + b * y)
        f = letter.height / 2 - side * (a * y - b * x)
        canvas = letter.transform((side, side), Image.Transform.AFFINE, (a, b, c, -b, a, f), Image.Resampling.BILINEAR)
        ink = np.asarray(canvas.reduce(over), np.float32)[:, :, None] / 255

        paper = 255 * (self.PAPER[0] + (self.PAPER[1] - self.PAPER[0]) * u[4:7])
        colour = np.array(colorsys.hsv_to_rgb(u[7], between(self.SATURATION, u[8]), between(self.VALUE, u[9])))
        colour *= 255 * min(1, self.LUMA / (colour @ (0.299, 0.587, 0.114)))
        return (paper + ink * (colour - paper) + 0.5).astype(np.uint8)


@functools.lru_cache(maxsize=144)       # 36 glyphs at four resolutions
def drawn_letter(text, factor):
    """One glyph, drawn once at Glyphs.EM and reduced by an integer factor.

    Returns (L image with the inked box at its centre, pixels per em, box width, box height), the box in em.
    """
    font = ImageFont.load_default(Glyphs.EM)
    stroke = round(Glyphs.STROKE * Glyphs.EM)
    picture = Image.new("L", (2 * Glyphs.EM, 2 * Glyphs.EM))
    ImageDraw.Draw(picture).text((Glyphs.EM // 2, Glyphs.EM // 2), text, 255, font, stroke_width=stroke)
    left, top, right, bottom = picture.getbbox()
    width, height = right - left, bottom - top
    # sides divisible by 2 * factor, with two reduced pixels of zeros around, so that the centre stays the centre
    wide, high = (2 * factor * math.ceil(side / (2 * factor) + 2) for side in (width, height))
    left, top = left - (wide - width) / 2, top - (high - height) / 2
    shift = 1, 0, left, 0, 1, top
    picture = picture.transform((wide, high), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR)
    return picture.reduce(factor), Glyphs.EM / factor, width / Glyphs.EM, height / Glyphs.EM


def between(bounds, u):
    """The number a share u of the way between two bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u


def at_least_one(name, number):
    if number < 1:
        raise InputError(f"{name} {number}: expected at least 1")
    return int(number)


# ---------------------------------------------------------------------------------------------------------------------
# Solids: an endless point set that needs no file. Every shape is a list of triangles, (T,3,3), so that points uniform
# by area over the whole are one formula. x to the right, y up, z towards the viewer.

def box(centre, size):
    """Twelve triangles."""
    corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * size + centre
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return np.concatenate([corners[[(a, b, c), (a, c, d)]] for a, b, c, d in faces])


def grid(points):
    """Two triangles for every cell of an (m,n,3) sheet of points."""
    a, b, c, d = points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]
    return np.concatenate([np.stack([a, b, c], 2).reshape(-1, 3, 3), np.stack([a, c, d], 2).reshape(-1, 3, 3)])


def lathe(profile, centre=(0, 0, 0), sides=48):
    """The (radius, y) profile turned about a vertical axis: discs, cylinders, cones and whatever joins them."""
    radius, y = np.array(profile, float).T[:, :, None]
    turn = np.linspace(0, 2 * np.pi, sides + 1)
    return grid(np.stack([radius * np.cos(turn), y + 0 * turn, radius * np.sin(turn)], 2)) + centre


def torus(centre, ring, tube, start, stop):
    """An arc of a torus in the xy plane, angles in radians from the x axis."""
    along, around = np.linspace(start, stop, 25)[:, None], np.linspace(0, 2 * np.pi, 13)
    out = ring + tube * np.cos(around)
    return grid(np.stack([out * np.cos(along), out * np.sin(along), tube * np.sin(around) + 0 * along], 2)) + centre


def wing(root, span, chord, thick, sweep, taper):
    """A box along x from `root`, to the left if span < 0; its tip is `sweep` further back, its chord cut to `taper`."""
    triangles = box((0.5, 0, 0), (1, thick, chord))
    out = triangles[:, :, 0]
    triangles[:, :, 2] = triangles[:, :, 2] * (1 - (1 - taper) * out) + sweep * out
    return triangles * (span, 1, 1) + root


def legs(u, half_x, half_z, height, thick):
    """Four legs at (+-half_x, +-half_z), from the floor up; u < 0.5 square, else round and tapered."""
    spots = list(itertools.product((-half_x, half_x), (-half_z, half_z)))
    if u < 0.5:
        return [box((x, height / 2, z), (thick, height, thick)) for x, z in spots]
    return [lathe([(0, 0), (0.3 * thick, 0), (0.6 * thick, height)], (x, 0, z), sides=16) for x, z in spots]


def table(u):
    height, thick, half_x = between((0.5, 1.1), u[0]), between((0.03, 0.1), u[1]), between((0.5, 0.9), u[2])
    half_z, inset, leg = 0.5, between((0.65, 0.92), u[3]), between((0.05, 0.12), u[4])
    if u[5] < 0.3:      # round, on one foot
        return [lathe([(0, 0), (half_z, 0), (half_z, thick), (0, thick)], (0, height, 0)),
                lathe([(0, 0), (0.6 * half_z, 0), (0.6 * half_z, 0.04), (0.5 * leg, 0.06), (0.5 * leg, height)])]
    return [box((0, height + thick / 2, 0), (2 * half_x, thick, 2 * half_z)),
            *legs(u[6], inset * half_x, inset * half_z, height, leg)]


def chair(u):
    seat, half, leg = between((0.42, 0.55), u[0]), between((0.22, 0.30), u[1]), between((0.03, 0.06), u[2])
    back, thick = between((0.35, 0.65), u[3]), between((0.03, 0.07), u[4])
    parts = [box((0, seat + thick / 2, 0), (2 * half, thick, 2 * half)), *legs(u[5], half - leg, half - leg, seat, leg)]
    floor, behind = seat + thick, thick / 2 - half
    if u[6] < 0.5:      # a board, or two posts and three slats
        parts.append(box((0, floor + back / 2, behind), (2 * half, back, thick)))
    else:
        parts += [box((x, floor + back / 2, behind), (leg, back, thick)) for x in (leg / 2 - half, half - leg / 2)]
        slat = 2 * half - 2 * leg, 0.16 * back, thick
        parts += [box((0, floor + back * y, behind), slat) for y in (0.3, 0.6, 0.92)]
    if u[7] < 0.35:     # arms
        for x in (leg / 2 - half, half - leg / 2):
            parts.append(box((x, floor + 0.22, 0), (leg, 0.04, 2 * half)))
            parts.append(box((x, floor + 0.1, half - leg), (leg, 0.2, leg)))
    return parts


def lamp(u):
    foot, pole, shade = between((0.15, 0.28), u[0]), between((0.5, 1.3), u[1]), between((0.2, 0.42), u[2])
    top, high, rod = shade * between((0.3, 1.0), u[3]), between((0.25, 0.45), u[4]), between((0.015, 0.04), u[5])
    return [lathe([(0, 0), (foot, 0), (foot, 0.04), (rod, 0.07), (rod, pole)]),
            lathe([(shade, pole - 0.3 * high), (top, pole + 0.7 * high)])]


def mug(u):
    low, high, height = between((0.28, 0.4), u[0]), between((0.34, 0.44), u[1]), between((0.65, 1.0), u[2])
    ring, tube = height * between((0.24, 0.32), u[3]), between((0.035, 0.06), u[4])
    return [lathe([(0, 0), (low, 0), (high, height), (0.88 * high, height), (0.88 * low, 0.06), (0, 0.06)]),
            torus(((low + high) / 2, height / 2, 0), ring, tube, -np.pi / 2, np.pi / 2)]


def bottle(u):
    belly, body, neck = between((0.16, 0.3), u[0]), between((0.5, 0.8), u[1]), between((0.2, 0.4), u[2])
    throat, slope = belly * between((0.25, 0.45), u[3]), between((0.08, 0.3), u[4])
    return [lathe([(0, 0), (belly, 0), (belly, body), (throat, body + slope), (throat, body + slope + neck),
                   (1.25 * throat, body + slope + neck), (1.25 * throat, body + slope + neck + 0.05),
                   (0, body + slope + neck + 0.05)])]


def airplane(u):
    body, half_span, chord = between((0.08, 0.13), u[0]), between((0.7, 1.1), u[1]), between((0.22, 0.4), u[2])
    sweep, taper, tail = between((0.0, 0.5), u[3]), between((0.3, 0.8), u[4]), between((0.25, 0.4), u[5])
    hull = lathe([(0, -1), (0.6 * body, -0.93), (body, -0.75), (body, 0.4), (0.25 * body, 1), (0, 1)], sides=32)
    parts = [hull[:, :, [0, 2, 1]]]                                                 # its axis laid along z, nose at -z
    fin = wing((0, 0, 0.85), tail, 0.22, 0.02, 0.15, 0.6)
    parts.append(fin[:, :, [1, 0, 2]])
    for side in (-1, 1):
        parts.append(wing((0, -0.3 * body, -0.1), side * half_span, chord, 0.03, sweep, taper))
        parts.append(wing((0, 0.2 * body, 0.87), side * tail, 0.18, 0.02, 0.12, 0.6))
        if u[6] < 0.6:      # engines under the wing
            engine = lathe([(0, -0.12), (0.055, -0.12), (0.055, 0.12), (0, 0.12)], sides=16)[:, :, [0, 2, 1]]
            parts.append(engine + (side * 0.4 * half_span, -0.3 * body - 0.06, 0.4 * sweep - 0.25))
    return parts


def bookshelf(u):
    half_x, height, deep = between((0.3, 0.6), u[0]), between((1.0, 1.8), u[1]), between((0.22, 0.4), u[2])
    shelves, thick = 3 + int(4 * u[3]), between((0.025, 0.05), u[4])
    parts = [box((x, height / 2, 0), (thick, height, deep)) for x in (-half_x, half_x)]
    parts += [box((0, y, 0), (2 * half_x - thick, thick, deep))
              for y in np.linspace(thick / 2, height - thick / 2, shelves)]
    if u[5] < 0.6:      # a back
        parts.append(box((0, height / 2, -deep / 2), (2 * half_x, height, 0.02)))
    return parts


def normalise(points):
    """(points - centre) / scale with centre and scale of the bounding box: its longest side spans [-1,1].

    points (n,3) -> (float32 (n,3) in [-1,1], centre float64 (3,), scale float); back: points * scale + centre.
    Raises InputError where points are not finite or all the same.
    """
    points = np.asarray(points, np.float64)
    low, high = points.min(0), points.max(0)
    centre, scale = (low + high) / 2, float((high - low).max() / 2)
    if not 0 < scale < np.inf:                      # NaN fails too
        raise InputError("found points that are not finite, or all the same; expected those of a surface")
    return ((points - centre) / scale).astype(np.float32), centre, scale


class Solids:
    """Seven kinds of things with random proportions. `item` -> float32 (P,3) in [-1,1], label i % 7.

    Points are uniform by area over the surface; the box that is normalised is that of the surface itself, so every
    draw from one shape agrees. rng draws the points; without it they depend on i alone, and a larger P only appends.
    """
    needs = "no --data"
    domain = "points"
    SHAPES = {f.__name__: f for f in (table, chair, lamp, mug, bottle, airplane, bookshelf)}

    def __init__(self, points=2048, split="train"):
        self.points, self.split = at_least_one("points", points), split_code(split)
        self.class_names = list(self.SHAPES)

    def __len__(self):
        return 2 ** 20

    def surface(self, i):
        """Shape i as float32 triangles (T,3,3), normalised."""
        shape = self.SHAPES[self.class_names[i % len(self.class_names)]]
        triangles = np.concatenate(shape(np.random.default_rng((ITEM, self.split, i)).random(8)))
        return normalise(triangles.reshape(-1, 3))[0].reshape(-1, 3, 3)

    def item(self, i, rng=None):
        rng = np.random.default_rng((POINTS, self.split, i)) if rng is None else rng
        return on_surface(self.surface(i), rng.random((self.points, 3))), i % len(self.class_names)


def on_surface(triangles, u):
    """Maps u, uniform in [0,1)^3, (P,3), to points uniform by area on triangles (T,3,3): float32 (P,3)."""
    a, b, c = np.moveaxis(triangles.astype(np.float64), 1, 0)
    area = np.cumsum(np.linalg.norm(np.cross(b - a, c - a), axis=1))
    chosen = np.searchsorted(area, u[:, 0] * area[-1], side="right")
    # the square root makes the point uniform in the triangle (Osada et al. 2002, Shape Distributions, eq. 1)
    root, v = np.sqrt(u[:, 1:2]), u[:, 2:3]
    return ((1 - root) * a[chosen] + root * (1 - v) * b[chosen] + root * v * c[chosen]).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Folder: pictures on disk, as their owner sees them.

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".gif", ".tif", ".tiff",
              ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga"}
SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}


class Folder:
    """Any directory of pictures, a .zip of one, or LSUN's lmdb. `item` -> uint8 (R,R,3), label = index of the
    sub-directory, 0 without classes.

    Several sub-directories with pictures are classes, sorted by name, so that ImageNet's get the numbers of ADM and DiT;
    pictures that lie flat, or under one sub-directory, have none, and labels=False takes none. Of a set that is split
    into train, val, ... only train is read (name another one to read it). Names with a leading dot are skipped.
    Raises InputError for a path without pictures and, from `item`, for a picture that cannot be read.
    """
    needs = "a directory of pictures, flat or one sub-directory per class (ImageNet: train/nXXXXXXXX/*.JPEG), or a .zip of one"
    domain = "image"

    def __init__(self, path, res, flip=False, labels=True):
        self.res, self.flip, self.path = at_least_one("res", res), flip, os.fspath(path)
        self.names = picture_names(self.path)
        if not self.names:
            raise InputError(f"{path}: no pictures in it; expected {self.needs} ({' '.join(sorted(EXTENSIONS))})")
        below, tops = self.names, top_folders(self.names)
        if "train" in tops and set(tops) <= SPLIT_FOLDERS:
            self.names = [name for name, top in zip(self.names, tops) if top == "train"]
            below, tops = self.names, top_folders([name.partition("/")[2] for name in self.names])
        classes = sorted(set(tops) - {""}) if labels else []
        if len(classes) < 2:
            classes = []
        elif "" in tops:
            raise InputError(f"{os.path.join(path, below[tops.index('')])}: lies beside class folders; expected {self.needs}")
        number = {name: label for label, name in enumerate(classes)}
        self.class_names, self.labels = classes, [number.get(top, 0) for top in tops]

    @property
    def files(self):
        return [os.path.join(self.path, name) for name in self.names]

    def __len__(self):
        return len(self.names)

    def item(self, i, rng=None):
        pixels = fit(open_picture(self.path, self.names[i]), self.res)
        return mirrored(pixels, rng if self.flip else None), self.labels[i]


def picture_names(path):
    """The names below path, in order, of all pictures in a directory, a .zip or an lmdb; between folders stands a /."""
    if is_archive(path):
        return list(archive(path, os.getpid())[0])
    if not os.path.isdir(path):
        raise InputError(f"{path}: no such directory; expected {Folder.needs}")
    start = len(os.path.join(path, ""))
    return [file[start:].replace(os.sep, "/") for file in find_files(path, EXTENSIONS)]


def open_picture(path, name):
    """A picture of `picture_names` as `read_image` returns it."""
    if is_archive(path):
        return read_image(os.path.join(path, name), lambda: archive(path, os.getpid())[1](name))
    return read_image(os.path.join(path, name))


@functools.lru_cache(maxsize=64)       # asked for every picture, and a shared file system answers slowly
def is_archive(path):
    return path.lower().endswith(".zip") and os.path.isfile(path) or os.path.isfile(os.path.join(path, "data.mdb"))


@functools.lru_cache(maxsize=4)
def archive(path, process):
    """(names, read) of a .zip of pictures, or of LSUN's lmdb, whose values are picture files: read(name) -> bytes.

    Opened once in every process, since forked ones would share a file position, and lmdb not at all while it forks.
    """
    if path.lower().endswith(".zip"):
        opened = open_zip(path)
        names = [name for name in opened.namelist() if os.path.splitext(name)[1].lower() in EXTENSIONS
                 and not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))]
        return sorted(names), opened.read
    lmdb = optional("lmdb", path)
    try:
        # read-only, without its lock file, which a shared file system may refuse
        opened = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
        wanted, size = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"], os.path.getsize(os.path.join(path, "data.mdb"))
        if size < wanted:                             # to read on there would end the process: it is mapped
            raise InputError(f"{path}: data.mdb has {size} bytes; expected {wanted}, it is cut off")
        view = opened.begin(buffers=False)
        names = [key.decode("latin-1") for key in view.cursor().iternext(values=False)]
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=archive.cache_clear)
    except lmdb.Error as error:
        raise InputError(f"{path}: cannot be read as an lmdb ({one_line(error)})") from None
    return names, lambda name: view.get(name.encode("latin-1"))


def open_zip(path):
    """A zipfile.ZipFile, open for reading and `harmless`. Raises InputError for what is none."""
    try:
        opened = zipfile.ZipFile(path)
    except Exception as error:                        # hostile directories raise nearly anything
        raise InputError(f"{path}: cannot be read as a .zip ({one_line(error)})") from None
    return harmless(opened, path)


def harmless(opened, path):
    """The archive. Raises InputError for one that was made to do harm: with names that lead out of it, or with sizes that no
    memory holds."""
    for entry in opened.infolist():
        if entry.filename.startswith(("/", "\\")) or ".." in entry.filename.replace("\\", "/").split("/"):
            raise InputError(f"{path}: holds the name {entry.filename}, which leads out of it; expected names of what is in it")
        if entry.file_size > memory() and entry.compress_type != zipfile.ZIP_STORED or entry.file_size > 2 ** 50:
            raise InputError(f"{path}: {entry.filename} says that it unpacks to {entry.file_size:,} bytes, this machine has {memory():,}")
    return opened


def memory():
    """Bytes of memory of this machine; 2^40 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2 ** 40


def optional(package, path):
    """Imports a package that a single format needs."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{path}: reading it needs the package {package}: pip install {package}") from None


def find_files(path, suffixes):
    """All files of these suffixes below path, sorted; follows links, but enters no directory twice on one way down."""
    found, todo, ways = [], [(path, (os.path.realpath(path),))], collections.Counter()
    while todo:
        folder, above = todo.pop()
        try:
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]   # .git, ._photo.jpg
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed ({one_line(error)})") from None
        for entry in entries:
            try:
                real = os.path.realpath(entry.path) if entry.is_dir() else None
                wanted = not real and os.path.splitext(entry.name)[1].lower() in suffixes and entry.is_file()
            except OSError:                           # a link to itself, as much as one to nowhere, is nothing to read
                continue
            if real and real not in above:
                todo.append((entry.path, above + (real,)))
                ways[real] += 1
                if ways[real] > 500:
                    raise InputError(f"{entry.path}: one of more than 500 ways to a directory; expected links that do not lead into each other")
            elif wanted:
                found.append(entry.path)
    return sorted(found)


def top_folders(names):
    """For each name the first folder on the way to it; "" where there is none."""
    return [name.partition("/")[0] if "/" in name else "" for name in names]


def read_image(path, read=None):
    """A picture file as an RGB Pillow image: upright, first frame, transparency on white, 16 bits scaled to 8.

    read() gives the bytes of a file in an archive. Raises InputError naming the path if it cannot be read to its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of damaged EXIF, of large pictures; what counts is whether pixels come out
            with Image.open(path if read is None else io.BytesIO(read()), formats=formats()) as file:
                image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            if image.mode.startswith("I"):          # 16-bit grey, which convert would clip; 65535 / 257 = 255
                grey = np.rint(np.clip(np.asarray(image) / 257, 0, 255)).astype(np.uint8)
                return Image.fromarray(grey).convert("RGB")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")
    except PIL.UnidentifiedImageError:
        raise InputError(f"{path}: cannot be read as a picture (not one of {', '.join(formats())})") from None
    except Exception as error:                      # broken bytes make Pillow's decoders raise nearly anything
        raise InputError(f"{path}: cannot be read as a picture ({one_line(error)})") from None


@functools.lru_cache(maxsize=1)
def formats():
    """Those of EXTENSIONS that this Pillow reads. No others, whatever a file is called: Pillow gives EPS to a program."""
    Image.init()
    return [name for name in ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA") if name in Image.OPEN]


def fit(image, res):
    """Centre crop and resize as ADM does (guided-diffusion, center_crop_arr): uint8 (res,res,3)."""
    if max(image.size) > 64 * min(image.size):        # a line of pixels would first grow to res x millions
        half = 32 * min(image.size)
        x, y = image.width // 2, image.height // 2
        image = image.crop((max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half)))
    while min(image.size) >= 2 * res:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = res / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return np.array(image.crop((left, top, left + res, top + res)))


def mirrored(pixels, rng):
    """Flipped left to right with probability 1/2; as it is where rng is None."""
    return pixels[:, ::-1].copy() if rng is not None and rng.random() < 0.5 else pixels


# ---------------------------------------------------------------------------------------------------------------------
# Packed: what `python data.py pack` made of a folder, cropped and resized already; nothing is decoded in training.

class Packed:
    """manifest.json, labels.npy int64 (N,), files.txt (the names, as JSON strings, one a line) and pictures-*.npy uint8
    (n,R,R,3), memory-mapped: the items of the Folder that it was made of, pixel for pixel and in the same order.

    Raises InputError for a set that is not whole, or of another resolution than asked for.
    """
    needs = "a directory written by data.py pack"
    domain = "image"

    def __init__(self, path, res=None, flip=False, labels=True):
        self.path, self.flip = os.fspath(path), flip
        manifest = self.manifest = read_manifest(path)
        if not manifest["complete"]:
            raise InputError(f"{path}: packed only in part; run the same data.py pack again, it goes on")
        self.res = manifest["res"]
        if res not in (None, self.res):
            raise InputError(f"{path}: packed at {self.res} x {self.res}; expected --res {self.res}, or pack it again at {res}")
        self.labels = read_array(os.path.join(path, "labels.npy"), (manifest["count"],), np.int64)
        self.shards = [read_array(os.path.join(path, shard["file"]), (shard["count"], self.res, self.res, 3), np.uint8)
                       for shard in manifest["shards"]]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.class_names = manifest["class_names"] if labels else []
        if self.starts[-1] != manifest["count"]:
            raise InputError(f"{path}: its files hold {self.starts[-1]} pictures; expected {manifest['count']}")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < max(1, len(manifest["class_names"])):
            raise InputError(f"{path}: labels.npy runs from {self.labels.min()} to {self.labels.max()}; "
                             f"expected one of {len(manifest['class_names'])} classes")

    @property
    def files(self):
        path = os.path.join(self.path, "files.txt")
        try:
            with open(path, encoding="utf-8") as file:
                names = [json.loads(line) for line in file]
            if len(names) != len(self) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{len(names)} lines for {len(self)} pictures")
            return names
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: not written by data.py pack ({one_line(error)})") from None

    def __len__(self):
        return len(self.labels)

    def item(self, i, rng=None):
        shard = int(np.searchsorted(self.starts, i, "right")) - 1
        pixels = np.array(self.shards[shard][i - self.starts[shard]])
        return mirrored(pixels, rng if self.flip else None), int(self.labels[i]) if self.class_names else 0


def is_packed(path):
    return os.path.isfile(os.path.join(path, "manifest.json"))


def read_manifest(path):
    """path/manifest.json of a packed set. Raises InputError naming what is wrong with it."""
    path = os.path.join(path, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["format"] != PACKED_FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        kinds = dict(count=int, res=int, class_names=list, complete=bool, shards=list, listing_sha256=str)
        wrong = [key for key, kind in kinds.items() if not isinstance(manifest[key], kind)]
        wrong += [f"shards[{i}]" for i, shard in enumerate(manifest["shards"]) if shard["file"] != shard_name(i)
                  or not isinstance(shard["count"], int) or shard["count"] < 1
                  or not all(isinstance(shard[key], str) for key in ("sha256", "source_sha256"))]
        wrong += ["class_names"] * (not all(isinstance(name, str) for name in manifest["class_names"]))
        if wrong:
            raise ValueError(f"wrong entries for {', '.join(wrong)}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not written by data.py pack ({one_line(error)}); expected format {PACKED_FORMAT!r}") from None


PACKED_FORMAT = "ASFT packed pictures 1"


def read_array(path, shape, dtype):
    """A .npy of that shape and type, memory-mapped."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except BROKEN_ARRAY as error:
        raise InputError(f"{path}: cannot be read; expected a plain .npy array ({one_line(error)})") from None
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an .npz archive"
        raise InputError(f"{path}: found {found}; expected {np.dtype(dtype)} {shape}")
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Npz: a whole picture set in one file, held in memory.

class Npz:
    """`images` uint8 (N,H,W), (N,H,W,1) or (N,H,W,3), and perhaps `labels` int (N,) and `label_names` str (K,).

    `item` -> uint8 (R,R,3), label 0..K-1 (0 without labels). Without label_names the classes are the label values in
    ascending order, whatever they are. Without res the pictures must be square and stay as they are.
    Raises InputError naming the file, the key, what was found and what was expected.
    """
    needs = "an .npz file with `images` uint8 (N,H,W) or (N,H,W,3), and perhaps `labels` (N,) and `label_names`"
    domain = "image"

    def __init__(self, path, res=None, flip=False):
        arrays = read_npz(path, ("images", "labels", "label_names"))
        images = self.images = arrays.get("images")
        if images is None:
            raise InputError(f"{path}: no `images` in it; expected {self.needs}")
        shaped = images.ndim == 3 or images.ndim == 4 and images.shape[3] in (1, 3)
        if images.dtype != np.uint8 or not shaped or images.size == 0:
            raise InputError(f"{path}: `images` is {images.dtype} {images.shape}; expected uint8 (N,H,W) or (N,H,W,3)")
        height, width = images.shape[1:3]
        if res is None and height != width:
            raise InputError(f"{path}: `images` are {height} x {width}; expected square ones, or --res to crop them to")
        self.res, self.flip = at_least_one("res", height if res is None else res), flip
        self.class_names, self.labels = self.read_labels(path, arrays, len(images))

    @staticmethod
    def read_labels(path, arrays, count):
        labels, names = arrays.get("labels"), arrays.get("label_names")
        if labels is None:
            return [], np.zeros(count, np.int64)
        if labels.dtype.kind not in "iu" or labels.shape != (count,):
            raise InputError(f"{path}: `labels` is {labels.dtype} {labels.shape}; expected integers ({count},)")
        if names is None:
            present, labels = np.unique(labels, return_inverse=True)
            return [str(value) for value in present], labels.astype(np.int64)
        if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) < len(names):
            raise InputError(f"{path}: `label_names` is {names.dtype} {names.shape}; expected strings (K,), each once")
        if labels.min() < 0 or labels.max() >= len(names):
            raise InputError(f"{path}: `labels` run from {labels.min()} to {labels.max()}; "
                             f"expected 0 to {len(names) - 1}, one per entry of `label_names`")
        return names.tolist(), labels.astype(np.int64)

    def __len__(self):
        return len(self.images)

    def item(self, i, rng=None):
        pixels = self.images[i]
        if pixels.ndim == 2 or pixels.shape[2] == 1:
            pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
        pixels = fit(Image.fromarray(pixels), self.res)
        return mirrored(pixels, rng if self.flip else None), int(self.labels[i])


def read_npz(path, keys):
    """Those of the named arrays that the archive has. Raises InputError for anything but plain arrays in an .npz."""
    key = None
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            if not start.startswith(b"PK"):
                raise ValueError("it is a single .npy array" if start == b"\x93NUMPY" else "it is no zip archive, as an .npz is")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            harmless(archive.zip, path)
            arrays = {}
            for key in keys:
                if key in archive.files:
                    arrays[key] = archive[key]
                    if not isinstance(arrays[key], np.ndarray):
                        raise ValueError("it is no array")
            return arrays
    except InputError:
        raise
    except BROKEN_ARRAY as error:
        what = f"`{key}` cannot be read" if key else "cannot be read"
        raise InputError(f"{path}: {what}; expected an .npz of plain arrays ({one_line(error)})") from None


BROKEN_ARRAY = Exception      # what np.load and the members of archives raise for foreign, cut and hostile bytes: nearly anything


# ---------------------------------------------------------------------------------------------------------------------
# ShapeNet: PointFlow's ShapeNetCore.v2.PC15k, or any tree of the same layout.

# synset -> category of ShapeNetCore v2, in the names of PointFlow's datasets.py
CATEGORIES = {
    "02691156": "airplane", "02747177": "can", "02773838": "bag", "02801938": "basket", "02808440": "bathtub",
    "02818832": "bed", "02828884": "bench", "02843684": "birdhouse", "02871439": "bookshelf", "02876657": "bottle",
    "02880940": "bowl", "02924116": "bus", "02933112": "cabinet", "02942699": "camera", "02946921": "tin_can",
    "02954340": "cap", "02958343": "car", "02992529": "cellphone", "03001627": "chair", "03046257": "clock",
    "03085013": "keyboard", "03207941": "dishwasher", "03211117": "monitor", "03261776": "earphone",
    "03325088": "faucet", "03337140": "file", "03467517": "guitar", "03513137": "helmet", "03593526": "jar",
    "03624134": "knife", "03636649": "lamp", "03642806": "laptop", "03691459": "speaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwave", "03790512": "motorcycle", "03797390": "mug",
    "03928116": "piano", "03938244": "pillow", "03948459": "pistol", "03991062": "pot", "04004475": "printer",
    "04074963": "remote_control", "04090263": "rifle", "04099429": "rocket", "04225987": "skateboard",
    "04256520": "sofa", "04330267": "stove", "04379243": "table", "04401088": "telephone", "04460130": "tower",
    "04468005": "train", "04530566": "vessel", "04554684": "washer",
}


class ShapeNet:
    """<synset>/{train,val,test}/<id>.npy, each floating (n,3); or shapenet.hdf5 of luost26/diffusion-point-cloud, the
    same tree with an array (S,n,3) for every split; or one of LION's reference files, ref_val_CATEGORY.pt, which are
    of split val. `item` -> float32 (P,3) in [-1,1].

    Every shape is normalised by the bounding box of all its stored points. rng picks P of them at random; without it
    they are PointFlow's reference points, the first P of those it sets aside for tests (from number 10,000 on), or the
    first P of all where the file has too few. category: "all", a name or a synset. labels=True makes the categories
    present classes, sorted by synset; else the set has none, as the paper's models do.
    Raises InputError for a tree of another layout and, from `item`, for a cloud that is not as above.
    """
    needs = "the tree ShapeNetCore.v2.PC15k: <synset>/{train,val,test}/<id>.npy of floats (15000,3), or shapenet.hdf5"
    domain = "points"
    SET_ASIDE = 10000       # PointFlow, datasets.py: the first 10,000 of 15,000 points train, the rest test

    def __init__(self, path, points=2048, split="train", category="all", labels=False):
        split_code(split)
        self.points = at_least_one("points", points)
        path = os.fspath(path)
        self.arrays = None                            # of a file that holds many clouds: one (n,3) for every item
        if os.path.isfile(path) and path.endswith((".pt", ".pth")):
            return self.read_reference(path, split, category)
        h5py = optional("h5py", path) if os.path.isfile(path) and path.endswith((".hdf5", ".h5")) else None
        if os.path.isdir(os.path.join(path, "ShapeNetCore.v2.PC15k")):
            path = os.path.join(path, "ShapeNetCore.v2.PC15k")
        if h5py is None and not os.path.isdir(path):
            raise InputError(f"{path}: no such directory; expected {self.needs}")
        try:
            tree = h5py and h5py.File(path, "r")
            present = sorted(tree) if h5py else sorted(name for name in os.listdir(path) if any(
                os.path.isdir(os.path.join(path, name, part)) for part in SPLITS))
            known = {name: key for key, name in CATEGORIES.items()}
            synset = category if category in present else known.get(category, category)
            if category != "all" and synset not in present:
                known = ", ".join(CATEGORIES.get(name, name) for name in present) or "none"
                raise InputError(f"category {category}: no {os.path.join(path, synset)}; the tree has {known}")
            chosen = present if category == "all" else [synset]
            self.files, self.labels, self.arrays = [], [], [] if h5py else None
            for label, name in enumerate(chosen):
                if h5py:
                    clouds = tree[name][split][...] if split in tree[name] else []
                    self.arrays += [*clouds]
                    self.files += [f"{path}/{name}/{split}[{i}]" for i in range(len(clouds))]
                else:
                    folder = os.path.join(path, name, split)
                    names = os.listdir(folder) if os.path.isdir(folder) else []
                    clouds = sorted(file for file in names if file.endswith(".npy") and not file.startswith("."))
                    self.files += [os.path.join(folder, file) for file in clouds]
                self.labels += [label if labels else 0] * len(clouds)
        except InputError:
            raise
        except Exception as error:                    # h5py raises nearly anything for a broken file
            raise InputError(f"{path}: cannot be read ({one_line(error)}); expected {self.needs}") from None
        if not self.files:
            raise EmptySplit(f"{path}: no cloud for split {split}; expected {self.needs}")
        self.class_names = [CATEGORIES.get(name, name) for name in chosen] if labels else []

    def read_reference(self, path, split, category):
        """LION's dict of tensors ref (S,n,3), mean (S,1,3), std (S,1,1): clouds less mean, over std."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.arrays = [*(content["ref"] * content["std"] + content["mean"]).float().numpy()]
        except Exception as error:                      # a foreign file raises whatever its bytes provoke
            raise InputError(f"{path}: cannot be read ({one_line(error)}); expected LION's dict of tensors ref, mean, std") from None
        if split != "val" or category not in ("all", *os.path.splitext(path)[0].split("_")):
            raise InputError(f"{path}: a reference file of split val; found --split {split}, --category {category}")
        self.files = [f"{path}[{i}]" for i in range(len(self.arrays))]
        self.labels, self.class_names = [0] * len(self.files), []

    def __len__(self):
        return len(self.files)

    def stored(self, i):
        """All points of shape i as stored: floats (n,3), n >= P, read-only."""
        cloud = read_cloud(self.files[i]) if self.arrays is None else cloud_of(self.arrays[i])
        if len(cloud) < self.points:
            raise InputError(f"found {len(cloud)} points; expected at least the {self.points} asked for")
        return cloud

    def whole(self, i):
        """All points of shape i, normalised: float32 (n,3)."""
        try:
            return normalise(self.stored(i))[0]
        except InputError as error:
            raise InputError(f"{self.files[i]}: {error}") from None

    def item(self, i, rng=None):
        cloud = self.whole(i)
        if rng is not None:
            return cloud[rng.choice(len(cloud), self.points, replace=False)], self.labels[i]
        start = self.SET_ASIDE if len(cloud) >= self.SET_ASIDE + self.points else 0
        return cloud[start:start + self.points].copy(), self.labels[i]


def read_cloud(path):
    """A cloud in a .npy file: floats (n,3), memory-mapped. The text of an InputError does not name the path."""
    try:
        return cloud_of(np.load(path, mmap_mode="r", allow_pickle=False))
    except InputError:
        raise
    except BROKEN_ARRAY as error:
        raise InputError(f"cannot be read; expected a plain .npy array ({one_line(error)})") from None


def cloud_of(array):
    """The array, if it is floats (n,3)."""
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind != "f":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an .npz archive"
        raise InputError(f"found {found}; expected floats (n,3)")
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Objaverse: clouds with condition tokens of pictures (App. G).

class Objaverse:
    """One .npz per object with `xyz` floats (n,3) and `cond_token` floats (T,C), INRFlow's layout, at any depth; under
    train/, val/, test/ where there are such. `item` -> float32 (P,3) in [-1,1], label 0, tokens float32 (T,C).

    rng picks P of the points at random. Where `python data.py tokens` wrote the set, tokens.json beside it says what the
    tokens are (`spec`, else None), and rng also picks the views: both for half of the items, else one of the two,
    given twice, which attention cannot tell from once. Raises InputError for a directory without such files and, from
    `item`, for a file that is not as above.
    """
    needs = "a directory of .npz files, one per object, of `xyz` floats (n,3) and `cond_token` floats (T,C)"
    domain = "points"
    class_names = []

    def __init__(self, path, points=16384, split="train"):
        split_code(split)
        self.points, path = at_least_one("points", points), os.fspath(path)
        if not os.path.isdir(path):
            raise InputError(f"{path}: no such directory; expected {self.needs}")
        self.spec = read_spec(path)
        if any(os.path.isdir(os.path.join(path, part)) for part in SPLITS):
            path = os.path.join(path, split)
        self.files = find_files(path, {".npz"}) if os.path.isdir(path) else []
        if not self.files:
            raise InputError(f"{path}: no .npz file in it; expected {self.needs}")
        self.first, problem = None, None
        for i in range(min(len(self), IN_A_ROW)):     # the first that can be read says what the others must be like
            try:
                self.n_tokens, self.token_dim = self.read(i)[1].shape
                self.first = self.files[i]
                break
            except InputError as error:
                problem = problem or error
        if self.first is None:
            raise problem

    def __len__(self):
        return len(self.files)

    def read(self, i):
        """Object i: its points, normalised, float32 (n,3), n >= P, and its tokens float32 (T,C)."""
        file, arrays = self.files[i], read_npz(self.files[i], ("xyz", "cond_token"))
        for key, width in (("xyz", 3), ("cond_token", None)):
            found = arrays.get(key)
            if found is None or found.dtype.kind != "f" or found.ndim != 2 or width not in (None, found.shape[1]):
                what = "missing" if found is None else f"{found.dtype} {found.shape}"
                raise InputError(f"{file}: `{key}` is {what}; expected floats ({'n,3' if width else 'T,C'})")
        xyz, tokens = arrays["xyz"], arrays["cond_token"].astype(np.float32)
        if not np.isfinite(tokens).all():
            raise InputError(f"{file}: `cond_token` holds numbers that are not finite")
        if len(xyz) < self.points:
            raise InputError(f"{file}: found {len(xyz)} points; expected at least the {self.points} asked for")
        if self.first and tokens.shape != (self.n_tokens, self.token_dim):
            raise InputError(f"{file}: `cond_token` is {tokens.shape}; expected {(self.n_tokens, self.token_dim)} as in {self.first}")
        try:
            return normalise(xyz)[0], tokens
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    def whole(self, i):
        """All points of object i, normalised: float32 (n,3)."""
        return self.read(i)[0]

    def item(self, i, rng=None):
        cloud, tokens = self.read(i)
        if rng is None:
            return cloud[:self.points].copy(), 0, tokens
        if self.spec is not None and self.spec["views"] == 2 and (u := rng.random()) < 0.5:
            tokens = np.concatenate(2 * [tokens[:self.n_tokens // 2] if u < 0.25 else tokens[self.n_tokens // 2:]])
        return cloud[rng.choice(len(cloud), self.points, replace=False)], 0, tokens


def read_spec(path):
    """What path/tokens.json says of the tokens beside it (features, size, views, ...); None where there is none."""
    path = os.path.join(path, "tokens.json")
    try:
        with open(path, encoding="utf-8") as file:
            spec = json.load(file)
        if not is_spec(spec):
            raise ValueError("an entry is missing or out of range")
        return spec
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not written by data.py tokens ({one_line(error)})") from None


def is_spec(spec):
    """Whether a value is what `python data.py tokens` writes about tokens."""
    return (isinstance(spec, dict) and spec.get("features") in FEATURES and spec.get("views") in (1, 2)
            and isinstance(spec.get("size"), int) and spec["size"] >= PATCH and spec["size"] % PATCH == 0
            and isinstance(spec.get("weights_sha256", 0), (str, type(None))))


DATASETS = {"glyphs": Glyphs, "solids": Solids, "folder": Folder, "npz": Npz, "shapenet": ShapeNet, "objaverse": Objaverse}


def load(name, path=None, res=None, points=None, category="all", split="train", flip=False, labels=None):
    """Builds DATASETS[name] from those of the arguments that it takes; None means its own default. A packed set stands
    wherever a folder may.

    Raises InputError for an unknown name or split and for an argument that is needed and missing.
    """
    if name not in DATASETS:
        raise InputError(f"--dataset {name}: expected one of {', '.join(DATASETS)}")
    given = dict(path=path, res=res, points=points, category=category, split=split, flip=flip, labels=labels)
    kind, options = Packed if name == "folder" and path and is_packed(path) else DATASETS[name], {}
    for key, parameter in inspect.signature(kind).parameters.items():
        if given.get(key) is not None:
            options[key] = given[key]
        elif parameter.default is parameter.empty:
            needs = f"--data is missing: it needs {DATASETS[name].needs}" if key == "path" else f"--{key} is missing"
            raise InputError(f"--dataset {name}: {needs}")
    return kind(**options)


# ---------------------------------------------------------------------------------------------------------------------
# The order of a run: which item comes at which position, and the batches that follow from it.

@functools.lru_cache(maxsize=2)         # workers read ahead over the end of an epoch; 4 MB for a set of 2**20
def permutation(n, seed, epoch):
    return np.random.default_rng((ORDER, seed, epoch)).permutation(n).astype(np.int32)


def item_index(n, seed, k):
    """Item at position k of an endless run over n items: each once per epoch, in a fresh order every epoch."""
    return int(permutation(n, seed, k // n)[k % n])


IN_A_ROW = 100      # items that may be unreadable one after another before something else must be wrong


class Run(torch.utils.data.Dataset):
    """run[k] -> (tensor, label), perhaps tokens: the item at position k, augmented by a generator of (seed, k) alone.

    With skip_bad an item that cannot be read is replaced by the one after it in the set: what stands at k stays a function
    of the set and (seed, k). Its number and what is wrong with it are put into `left_out`.
    """

    def __init__(self, dataset, seed, skip_bad=False):
        self.dataset, self.seed, self.skip_bad, self.left_out = dataset, seed, skip_bad, {}

    def __getitem__(self, k):
        n = len(self.dataset)
        first = item_index(n, self.seed, k)
        for i in range(first, first + min(n, IN_A_ROW)):
            try:
                array, label, *tokens = self.dataset.item(i % n, np.random.default_rng((self.seed, k)))
                return torch.from_numpy(array), label, *map(torch.from_numpy, tokens)
            except InputError as error:
                if not self.skip_bad:
                    raise
                self.left_out[i % n] = str(error)
        raise InputError(f"{min(n, IN_A_ROW)} items in a row cannot be read, the first: {self.left_out[first]}")

    def __getitems__(self, positions):
        # What torch's DataLoader calls for a batch. An exception would come back wrapped in the worker's traceback.
        try:
            samples = [self[k] for k in positions]
        except InputError as error:
            return error
        left_out, self.left_out = self.left_out, {}
        return samples, left_out


def collate(found):
    if isinstance(found, InputError):
        return found
    samples, left_out = found
    arrays, labels, *tokens = zip(*samples)
    return (torch.stack(arrays), torch.tensor(labels, dtype=torch.int64), *map(torch.stack, tokens)), left_out


def start_worker(_):
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):    # Ctrl-C and batch systems signal the whole group:
        signal.signal(number, signal.SIG_IGN)         # the main process saves first, then ends us
    if sys.platform == "linux":                       # and where it is killed itself, the kernel ends us: a worker that
        PR_SET_PDEATHSIG = 1                          # waits to hand over its batch would wait for ever (linux/prctl.h)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def positions(step, batch_size, micro, rank, world):
    """Lists of run positions, one per micro-batch of this rank, from optimizer step `step` on, without end."""
    block = batch_size // world
    for s in itertools.count(step):
        first = s * batch_size + rank * block
        for start in range(first, first + block, micro):
            yield list(range(start, start + micro))


def loader(dataset, seed, step, batch_size, micro, rank=0, world=1, workers=0, pin=False, left_out=None):
    """Endless iterator of micro-batches (values, labels), or (values, labels, tokens), from optimizer step `step` on.

    Step s reads run positions s*batch_size .. (s+1)*batch_size-1; rank r has the r-th of `world` equal blocks of them,
    cut in order into micro-batches: the same batches for every world, micro and workers.
    values: uint8 (micro,R,R,3) or float32 (micro,P,3); labels: int64 (micro,); tokens: float32 (micro,T,C).
    Raises InputError at once for sizes that do not divide, and while iterating for an item that cannot be read; where a
    dict `left_out` is given such items are replaced (see Run), and it says which: {number of the item: what is wrong}.
    """
    at_least_one("micro-batch", micro)
    if at_least_one("batch size", batch_size) % (world * micro):
        raise InputError(f"batch size {batch_size}: expected a multiple of {world} processes x micro-batch {micro}")
    if seed < 0 or step < 0 or workers < 0:
        raise InputError(f"seed {seed}, step {step}, workers {workers}: none may be negative")
    source = torch.utils.data.DataLoader(
        Run(dataset, seed, left_out is not None), batch_sampler=positions(step, batch_size, micro, rank, world), collate_fn=collate,
        num_workers=workers, worker_init_fn=start_worker, persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None, multiprocessing_context=context(workers), pin_memory=pin,
        generator=torch.Generator())                  # its own, or it would draw from the global one
    return unwrap(source, left_out)


def context(workers):
    """How worker processes start: fork shares the dataset's arrays; elsewhere than on Linux it is unsafe or missing."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None) if workers else None


def unwrap(source, left_out):
    for batch in results_of(source):
        if isinstance(batch, InputError):
            raise batch
        if left_out is not None:
            left_out.update(batch[1])
        yield tuple(batch[0])


def results_of(source):
    """What a DataLoader yields; its processes end with ours, and one that was killed is an InputError."""
    noticed = (source.num_workers > 0 and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
               and signal.getsignal(signal.SIGCHLD))
    results = iter(source)
    if source.num_workers:      # they ignore SIGTERM, by which Python would end them where an exception leaves them alive
        atexit.register(results._shutdown_workers)
        if noticed is not False:    # torch's handler would raise in the midst of whatever the main process does; here it is soon enough
            signal.signal(signal.SIGCHLD, noticed)
    try:
        yield from results
    except RuntimeError as error:
        if "killed by signal" not in str(error) and "exited unexpectedly" not in str(error):
            raise
        raise InputError(KILLED) from None
    except (OSError, EOFError) as error:              # it was just handing over a batch
        if not source.num_workers:
            raise
        raise InputError(f"{KILLED} ({one_line(error)})") from None


KILLED = "a data process was killed, most likely for want of memory; fewer --workers need less"


def decode_values(batch, device):
    """A loader's first tensor as the model's values: uint8 (B,R,R,3) -> float32 (B,R*R,3) in [-1,1]; points as are."""
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    return batch.flatten(1, 2).float() / 127.5 - 1


def encode_image(values, height, width):
    """The way back for one picture: (height*width,3) in [-1,1], clamped and rounded -> uint8 array (height,width,3)."""
    pixels = ((torch.as_tensor(values).detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).reshape(height, width, 3).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Meshes: surfaces to sample points from, and to render.

def read_mesh(path):
    """The surface in a mesh file: (triangles float64 (T,3,3), colours uint8 (T,3) or None), in the file's units and axes.

    Polygons become fans of triangles. Colours are an OBJ's materials (Kd), the mean of a PLY's vertices, or what
    trimesh makes of a GLB's textures. Raises InputError naming the path.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in MESHES:
        raise InputError(f"{path}: expected a mesh, one of {' '.join(MESHES)}")
    try:
        triangles, colours = MESHES[suffix](path)
    except InputError:
        raise
    except Exception as error:                      # broken files make any parser raise nearly anything
        raise InputError(f"{path}: cannot be read as a {suffix} mesh ({one_line(error)})") from None
    size = areas(triangles)
    if not np.isfinite(size).all() or not size.any():
        raise InputError(f"{path}: found {len(size)} triangles without a finite area; expected a surface")
    return triangles, colours


def areas(triangles):
    return np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1) / 2


def fans(points, polygons):
    """Polygons, lists of indices into points (V,3) -> (triangles float64 (T,3,3), the polygon of each (T,))."""
    points = np.asarray(points, np.float64).reshape(-1, 3)
    table = [(face[0], face[k], face[k + 1], i) for i, face in enumerate(polygons) for k in range(1, len(face) - 1)]
    table = np.array(table, np.int64).reshape(-1, 4)
    if len(table) and not 0 <= table[:, :3].min() <= table[:, :3].max() < len(points):
        raise ValueError(f"a face names a point that is not among its {len(points)}")
    return points[table[:, :3]], table[:, 3]


def read_off(path):
    """Geomview's OFF; in ModelNet's files the counts may follow the word without a space."""
    with open(path, encoding="latin-1") as file:
        rows = [row for row in (line.split("#")[0].split() for line in file) if row]
    at = rows[0][0].upper().find("OFF") if rows else -1      # COFF, NOFF: with colours, normals, which come after x y z
    if at < 0:
        raise ValueError("it does not begin with OFF")
    counts = [rows[0][0][at + 3:], *rows[0][1:]]
    counts = counts if any(counts) else rows.pop(1)
    n_points, n_faces = [int(word) for word in counts if word][:2]
    points, faces = rows[1:1 + n_points], rows[1 + n_points:1 + n_points + n_faces]
    if len(faces) < n_faces:
        raise ValueError(f"it ends before its {n_faces} faces do")
    return fans([[float(x) for x in row[:3]] for row in points],
                [[int(x) for x in row[1:1 + int(row[0])]] for row in faces])[0], None


def read_obj(path):
    """Wavefront OBJ: v, f with fans of any size and negative indices, and the Kd of its materials."""
    points, faces, kinds, materials, kind = [], [], [], {}, None
    with open(path, encoding="latin-1") as file:
        for line in file:
            word, rest = (*line.split(None, 1), "", "")[:2]
            if word == "v":
                points.append([float(x) for x in rest.split()[:3]])
            elif word == "f":
                face = [int(corner.split("/")[0]) for corner in rest.split()]
                faces.append([i - 1 if i > 0 else len(points) + i for i in face])
                kinds.append(kind)
            elif word == "usemtl":
                kind = rest.strip()
            elif word == "mtllib":
                materials.update(read_mtl(os.path.join(os.path.dirname(path), rest.strip())))
    triangles, owner = fans(points, faces)
    grey = (GREY, GREY, GREY)
    colours = np.array([materials.get(name, grey) for name in kinds], np.uint8).reshape(-1, 3)
    return triangles, colours[owner] if materials else None


def read_mtl(path):
    """Material names and their diffuse colours, 0..255; a library that is missing has none."""
    found, name = {}, None
    if not os.path.isfile(path):
        return found
    with open(path, encoding="latin-1") as file:
        for words in (line.split() for line in file):
            if words[:1] == ["newmtl"]:
                name = " ".join(words[1:])
            elif words[:1] == ["Kd"] and len(words) >= 4:
                found[name] = tuple(round(255 * min(max(float(x), 0), 1)) for x in words[1:4])
    return found


PLY_TYPES = dict(char="i1", uchar="u1", short="i2", ushort="u2", int="i4", uint="u4", float="f4", double="f8",
                 int8="i1", uint8="u1", int16="i2", uint16="u2", int32="i4", uint32="u4", float32="f4", float64="f8")


def read_ply(path):
    """The elements of a .ply, ascii or binary: {element: {property: array, or list of arrays for a list property}}.

    Raises ValueError, KeyError or IndexError for what is not one.
    """
    with open(path, "rb") as file:
        head, found, body = file.read().partition(b"end_header")
    lines = head.decode("latin-1").split("\n")
    if not found or lines[0].strip() != "ply":
        raise ValueError("no PLY header")
    body = body[body.index(b"\n") + 1:]
    words = [line.split() for line in lines if line.split() and line.split()[0] in ("format", "element", "property")]
    order = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}[words[0][1]]
    elements = []                                   # [name, count, [(property, type, type of its length or None), ...]]
    for kind, *rest in words[1:]:
        if kind == "element":
            elements.append((rest[0], int(rest[1]), []))
        elif rest[0] == "list":
            elements[-1][2].append((rest[3], PLY_TYPES[rest[2]], PLY_TYPES[rest[1]]))
        else:
            elements[-1][2].append((rest[1], PLY_TYPES[rest[0]], None))
    numbers, at, tables = np.array(body.split(), np.float64) if order is None else None, 0, {}

    def take(kind, n):
        """The next n numbers of a type."""
        nonlocal at
        if order is None:
            values = numbers[at:at + n]
            at += n
        else:
            values = np.frombuffer(body, order + kind, n, at)
            at += values.nbytes
        if n < 0 or len(values) < n:
            raise ValueError("it ends before its last element does")
        return values

    for name, count, fields in elements:
        table = tables[name] = {field: [] for field, _, _ in fields}
        if any(length for _, _, length in fields):
            for _ in range(count):
                for field, kind, length in fields:
                    table[field].append(take(kind, int(take(length, 1)[0])) if length else take(kind, 1)[0])
        elif order is None:
            table.update(zip(table, take(None, count * len(fields)).reshape(count, len(fields)).T))
        else:
            rows = np.frombuffer(body, [(field, order + kind) for field, kind, _ in fields], count, at)
            at += rows.nbytes
            table.update({field: rows[field] for field in table})
    return tables


def read_ply_mesh(path):
    tables = read_ply(path)
    vertex, face = tables["vertex"], tables["face"]
    indices = face["vertex_indices"] if "vertex_indices" in face else face["vertex_index"]
    polygons = [[int(i) for i in polygon] for polygon in indices]
    points = np.stack([np.asarray(vertex[axis], np.float64) for axis in "xyz"], 1)
    triangles, owner = fans(points, polygons)
    if not {"red", "green", "blue"} <= set(vertex):
        return triangles, None
    colour = np.stack([np.asarray(vertex[name], np.float64) for name in ("red", "green", "blue")], 1)
    return triangles, np.array([colour[polygon].mean(0) for polygon in polygons]).round().astype(np.uint8)[owner]


def read_stl(path):
    """STL, binary (an 80-byte header, a count, 50 bytes a triangle) or ascii."""
    with open(path, "rb") as file:
        raw = file.read()
    count = int.from_bytes(raw[80:84], "little")
    if len(raw) == 84 + 50 * count or len(raw) > 84 + 50 * count and not raw.lstrip().startswith(b"solid"):
        facets = np.frombuffer(raw, np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("spare", "<u2")]), count, 84)
        return facets["corners"].astype(np.float64), None
    if not raw.lstrip().startswith(b"solid"):
        raise ValueError("neither a binary STL of the size it states nor an ascii one")
    rows = [line.split()[1:4] for line in raw.decode("latin-1").splitlines() if line.split()[:1] == ["vertex"]]
    return np.array(rows, np.float64).reshape(-1, 3, 3), None


def read_glb(path):
    """glTF, by trimesh: scenes, transforms, textures and compressed buffers are not ours to rewrite."""
    trimesh = optional("trimesh", path)
    mesh = trimesh.load_scene(path).to_mesh()
    colours = mesh.visual.to_color().face_colors if mesh.visual.kind == "texture" else mesh.visual.face_colors
    return np.asarray(mesh.triangles, np.float64), np.asarray(colours, np.uint8)[:, :3]


MESHES = {".obj": read_obj, ".off": read_off, ".ply": read_ply_mesh, ".stl": read_stl, ".glb": read_glb, ".gltf": read_glb}


# ---------------------------------------------------------------------------------------------------------------------
# Views: a surface as a camera sees it (App. G), and the condition tokens of a picture.

# App. G: 40 degrees of view, 3.5 units away, on opposite sides along x and z, looking at the origin. Surfaces are scaled
# into the unit sphere, the largest that is seen whole from there: asin(1 / 3.5) = 16.6 < 20 degrees.
FIELD, EYES = math.radians(40), 3.5 / math.sqrt(2) * np.array([(1.0, 0, 1), (-1.0, 0, -1)])
GREY = 200


def camera(eye):
    """Right, up and forward of a camera at `eye` that looks at the origin, y up: the rows of a (3,3) rotation."""
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, (0, 1, 0))
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, forward), forward])


def render(triangles, colours=None, size=448):
    """Views of a surface (T,3,3) in the unit sphere from EYES: uint8 (2,size,size,3), white behind.

    Both sides of a triangle are seen, in one shade each; colours uint8 (T,3), None for grey. Twice the size inside,
    then averaged.
    """
    S, views = 2 * size, []
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    for eye in EYES:
        axes = camera(eye)
        x, y, depth = np.moveaxis((triangles - eye) @ axes.T, -1, 0)               # (T,3) each
        scale = S / 2 / math.tan(FIELD / 2)
        seen = rasterise(S / 2 + scale * x / depth, S / 2 - scale * y / depth, 1 / depth, S)
        # light from beside the camera, upper left, on whichever side it sees
        light = np.array((-0.35, 0.6, -1)) @ axes
        facing = np.sign(((eye - triangles[:, 0]) * normal).sum(1, keepdims=True)) * normal
        shade = 0.35 + 0.65 * np.clip(facing @ (light / np.linalg.norm(light)), 0, 1)
        colour = np.full((len(triangles), 3), GREY) if colours is None else colours
        palette = np.concatenate([colour * shade[:, None], np.full((1, 3), 255.0)])       # index -1: nothing there
        views.append(palette[seen].reshape(size, 2, size, 2, 3).mean((1, 3)).round().astype(np.uint8))
    return np.stack(views)


def rasterise(x, y, near, side):
    """Which triangle each pixel sees: int64 (side,side), -1 for none.

    x, y, near (T,3): corners in pixels, and 1 / depth, which is linear on the screen. Triangles are filled many at a
    time, those of like size together, each in a square of pixels around it.
    """
    depth, seen = np.zeros(side * side), np.full(side * side, -1)
    low = np.stack([np.ceil(z.min(1) - 0.5).clip(0, side) for z in (x, y)], 1).astype(np.int64)       # pixel centres
    high = np.stack([np.floor(z.max(1) - 0.5).clip(-1, side - 1) for z in (x, y)], 1).astype(np.int64)
    wide, high = (high - low + 1).clip(0).T
    extent = np.maximum(wide, high) * (np.minimum(wide, high) > 0)
    ax, bx, cx = x.T
    ay, by, cy = y.T
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    size = 1
    while size < 2 * extent.max(initial=0):
        group = np.flatnonzero((extent > size // 2) & (extent <= size) & (area != 0))
        group = group[np.argsort(wide[group] - high[group], kind="stable")]
        parts = min(len(group), math.ceil(len(group) * size * size / 2 ** 17))
        for some in np.array_split(group, parts) if parts else []:
            px = low[some, 0, None, None] + np.arange(wide[some].max())                  # (t,1,w), (t,h,1): pixels
            py = low[some, 1, None, None] + np.arange(high[some].max())[:, None]
            ends = [z[some, None, None] - p - 0.5 for p, corners in ((px, (ax, bx, cx)), (py, (ay, by, cy))) for z in corners]
            u = (ends[1] * ends[5] - ends[4] * ends[2]) / area[some, None, None]          # shares of the corners a and b
            v = (ends[2] * ends[3] - ends[5] * ends[0]) / area[some, None, None]
            inside = (u >= 0) & (v >= 0) & (u + v <= 1) & (px < side) & (py < side)
            t, i, j = np.nonzero(inside)
            u, v = u[inside], v[inside]
            a, b, c = near[some[t]].T
            closeness, pixel = u * a + v * b + (1 - u - v) * c, (low[some[t], 1] + i) * side + low[some[t], 0] + j
            front = closeness > depth[pixel]
            order = np.argsort(closeness[front], kind="stable")                          # the nearest is written last
            pixel, t = pixel[front][order], some[t[front][order]]
            depth[pixel], seen[pixel] = closeness[front][order], t
        size *= 2
    return seen.reshape(side, side)


PATCH = 14       # pixels, DINOv2's


def rays(views=2, size=448):
    """Plucker coordinates (d, o x d), |d| = 1, of the ray from each eye o through the centre of each patch, row by row:
    float32 (views, (size/14)^2, 6)."""
    side = size // PATCH
    centre = (2 * (np.arange(side) + 0.5) / side - 1) * math.tan(FIELD / 2)
    found = []
    for eye in EYES[:views]:
        way = np.stack([*np.meshgrid(centre, -centre), np.ones((side, side))], -1).reshape(-1, 3) @ camera(eye)
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        found.append(np.concatenate([way, np.cross(eye, way)], 1))
    return np.stack(found).astype(np.float32)


def raw_patches(pictures):
    """The pixels of each patch, in [-1,1]: uint8 (V,S,S,3) -> float32 (V, (S/14)^2, 588)."""
    V, S = pictures.shape[:2]
    cells = pictures.reshape(V, S // PATCH, PATCH, S // PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return (cells / np.float32(127.5) - 1).reshape(V, (S // PATCH) ** 2, -1)


def dino_features(weights=None, device="cpu"):
    """Patch features of a DINOv2 ViT: (function uint8 (V,S,S,3) -> float32 (V, (S/14)^2, D), SHA-256 of its weights).

    weights: a released state dict, or torch.hub's directory that holds one (None: torch.hub's own).
    """
    try:
        from metrics import dinov2
    except ImportError:
        raise InputError("--features dinov2: needs metrics/dinov2.py of this project beside data.py") from None
    try:
        path = dinov2.find(weights or torch.hub.get_dir())
        net = dinov2.load(path).to(device)
    except ValueError as error:
        raise InputError(f"DINOv2's weights: {error}; --features patches needs none") from None
    except (RuntimeError, AssertionError) as error:   # of torch, for a device that is not there
        raise InputError(f"--device {device}: cannot be used ({one_line(error)})") from None
    return lambda pictures: net(torch.from_numpy(pictures).to(device)).float().cpu().numpy(), file_sha256(path)


FEATURES = {"dinov2": dino_features, "patches": lambda weights, device: (raw_patches, None)}


def read_views(files, size):
    """Picture files as views: uint8 (V,size,size,3), cropped and resized as training pictures are."""
    return np.stack([fit(read_image(file), size) for file in files])


def picture_tokens(views, extract):
    """Condition tokens of one object: uint8 (V,S,S,3) -> float32 (V n, C + 6), of each patch the features, then its ray."""
    return np.concatenate(np.concatenate([extract(views), rays(*views.shape[:2])], 2))


# ---------------------------------------------------------------------------------------------------------------------
# python data.py: sets made ready once, ahead of training.

class Task(torch.utils.data.Dataset):
    """function(item) of every item as a dataset, so that torch's loader computes them, in processes that end with ours."""

    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            return self.function(self.items[i])
        except (InputError, OSError, MemoryError) as error:            # of a worker they would come wrapped in its traceback
            return error if isinstance(error, InputError) else InputError(message(error))


def as_is(x):
    return x


def in_parallel(function, items, workers, unit):
    """Yields function(item) of every item, in order, with a progress bar; an InputError is yielded, not raised."""
    source = torch.utils.data.DataLoader(
        Task(function, items), batch_size=None, collate_fn=as_is, num_workers=workers, worker_init_fn=start_worker,
        prefetch_factor=16 if workers else None, multiprocessing_context=context(workers), generator=torch.Generator())
    yield from tqdm(results_of(source), total=len(items), unit=unit)


def write_atomic(path, write):
    """write(file) into a temporary file beside path, fsync, rename: a reader finds the old file or the new one, whole; what
    fails leaves the old one, and raises OSError with the path."""
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = os.fspath(path)                           # a full disk does not say where
        if os.path.isfile(temporary) or os.path.islink(temporary):
            os.remove(temporary)
        raise


def write_json(path, content):
    write_atomic(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


SHARD = 2 ** 30      # bytes: some 5,000 pictures of 256 x 256


def pack(args):
    """Writes what Packed reads. Files of a whole shard each, so that a run that was killed goes on at the next one; the
    bytes depend on the source alone (and on Pillow's decoders), never on interruptions or processes."""
    if is_packed(args.src):
        raise InputError(f"{args.src}: packed already; expected pictures")
    if os.path.realpath(args.dst).startswith(os.path.join(os.path.realpath(args.src), "")):
        raise InputError(f"{args.dst}: lies in {args.src}; expected a directory beside it")
    source = Folder(args.src, args.res, labels=not args.no_labels)
    listing = dict(format=PACKED_FORMAT, res=args.res, count=len(source), class_names=source.class_names,
                   crop="ADM's center_crop_arr: halved by box filter while twice too large, bicubic to size, centre crop",
                   listing_sha256=listing_sha256(source.names, source.labels), pillow=PIL.__version__)
    if os.path.isdir(args.dst) and os.listdir(args.dst) and not is_packed(args.dst) and LOCK not in os.listdir(args.dst):
        raise InputError(f"{args.dst}: not empty; expected a new directory, or one that data.py pack began")
    os.makedirs(args.dst, exist_ok=True)
    with only_one(args.dst):
        pack_alone(args, source, listing)


def pack_alone(args, source, listing):
    at = lambda name: os.path.join(args.dst, name)
    size = max(1, SHARD // (3 * args.res ** 2))
    manifest = dict(listing, shards=[], source_sha256=None, complete=False)
    if is_packed(args.dst):
        there = read_manifest(args.dst)
        differ = [key for key, value in listing.items() if there.get(key) != value]
        if differ:
            raise InputError(f"{args.dst}: holds a packed set of another {', '.join(differ)}; give another directory")
        manifest["shards"] = list(whole_shards(args, there, size))
        if len(manifest["shards"]) < len(there["shards"]):
            print(f"{there['shards'][len(manifest['shards'])]['file']}: damaged, packed again from there on")
    write_json(at("manifest.json"), manifest)
    write_atomic(at("labels.npy"), lambda file: np.save(file, np.array(source.labels, np.int64)))
    write_atomic(at("files.txt"), lambda file: file.writelines(json.dumps(name).encode() + b"\n" for name in source.names))
    begun = sum(shard["count"] for shard in manifest["shards"])
    if begun:
        print(f"{begun} of {len(source)} pictures are in {args.dst} already")
    results = in_parallel(functools.partial(packed_picture, source), range(begun, len(source)), args.workers, "picture")
    for start in range(begun, len(source), size):
        count = min(size, len(source) - start)
        shard = dict(file=shard_name(start // size), count=count, sha256=None, source_sha256=None)
        of_source, of_file = hashlib.sha256(), hashlib.sha256()

        def write(file):
            for bytes_of in (header((count, args.res, args.res, 3)), *itertools.repeat(None, count)):
                if bytes_of is None:
                    result = next(results)
                    if isinstance(result, InputError):
                        if not manifest["shards"]:                     # nothing of worth is there yet
                            for name in ("manifest.json", "labels.npy", "files.txt"):
                                os.remove(at(name))
                        raise InputError(f"{result}; data.py check lists all such files")
                    digest, bytes_of = result
                    of_source.update(digest)
                of_file.update(bytes_of)
                file.write(bytes_of)
        write_atomic(at(shard["file"]), write)
        shard.update(sha256=of_file.hexdigest(), source_sha256=of_source.hexdigest())
        manifest["shards"].append(shard)
        write_json(at("manifest.json"), manifest)
    next(results, None)                               # ends the progress bar
    digest = hashlib.sha256("".join(shard["source_sha256"] for shard in manifest["shards"]).encode()).hexdigest()
    manifest.update(source_sha256=digest, complete=True)
    write_json(at("manifest.json"), manifest)
    total = sum(os.path.getsize(at(name)) for name in os.listdir(args.dst))
    print(f"{len(source)} pictures of {len(source.class_names) or 'no'} classes at {args.res} x {args.res} in {args.dst}: "
          f"{len(manifest['shards'])} files, {total / 1e9:.2f} GB; train with --data {args.dst} --res {args.res}")


def listing_sha256(names, labels):
    return hashlib.sha256(json.dumps([names, labels]).encode()).hexdigest()


def shard_name(i):
    return f"pictures-{i:05d}.npy"


def whole_shards(args, manifest, size):
    """Those of a manifest's shards, from the first on, that are whole: what comes after a damaged one is packed anew."""
    digests = in_parallel(functools.partial(shard_sha256, args.dst), manifest["shards"], args.workers, "file")
    left = manifest["count"]
    for shard, digest in zip(manifest["shards"], digests):
        if shard["count"] != min(size, left) or digest != shard["sha256"]:
            return
        left -= shard["count"]
        yield shard


def shard_sha256(path, shard):
    """SHA-256 of a shard's file, None where it is gone."""
    path = os.path.join(path, shard["file"])
    return file_sha256(path) if os.path.isfile(path) else None


LOCK = "lock"


@contextlib.contextmanager
def only_one(directory):
    """Locks a directory for this process alone (its forked workers do not hold the lock), by a file in it that says who has it.
    Yields a function that says whether it still does: directories can be removed, and made anew by others.

    Raises InputError where another process has it."""
    path = os.path.join(directory, LOCK)
    while True:
        file = open(path, "a+b")
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read(200).decode("utf-8", "replace").strip()
            file.close()
            raise InputError(f"{directory}: another process writes it ({holder or 'it has the lock'}); wait for its end, "
                             f"or give another directory") from None
        except (ImportError, OSError) as error:       # no such locks on this system, or not on its shared file system
            print(f"{path}: cannot be locked ({one_line(error)}); see to it that nothing else writes there", file=sys.stderr)
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break                                     # else the one before us has just removed it
        file.close()
    ours = lambda: os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    with file:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            file.flush()
        except OSError as error:                      # a full disk: its lock holds without words
            print(f"{path}: {message(error)}", file=sys.stderr)
        try:
            yield ours
        finally:
            if ours():
                os.remove(path)
            with contextlib.suppress(OSError):        # where nothing was written
                os.rmdir(directory)


def header(shape):
    """The first bytes of a .npy of uint8."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
    return file.getvalue()


def packed_picture(source, i):
    """(SHA-256 of the picture's file, its pixels as Folder gives them)."""
    return hashlib.sha256(picture_bytes(source.path, source.names[i])).digest(), source.item(i)[0].tobytes()


def picture_bytes(path, name):
    """A picture file as it is stored."""
    try:
        if is_archive(path):
            return archive(path, os.getpid())[1](name)
        with open(os.path.join(path, name), "rb") as file:
            return file.read()
    except Exception as error:                      # broken archives raise nearly anything
        raise InputError(f"{os.path.join(path, name)}: cannot be read ({one_line(error)})") from None


def check(args):
    """Lists what is wrong with a set, file by file, and counts its classes; returns 1 where anything is wrong, else 0."""
    look, names, classes = contents(args.path)
    if not names:
        raise InputError(f"{args.path}: nothing to check; expected pictures, clouds, or a packed set, as train.py reads them")
    seen, sizes, wrong = {}, {}, collections.Counter()

    def say(what, text):
        wrong[what] += 1
        tqdm.write(printable(f"{what}: {text}"))
    if is_packed(args.path):
        manifest = read_manifest(args.path)
        shards = manifest["shards"]
        if listing_sha256(names, Packed(args.path).labels.tolist()) != manifest["listing_sha256"]:
            say("damaged", "labels.npy or files.txt: not those that were packed; pack it again")
        found = in_parallel(functools.partial(shard_sha256, args.path), shards, args.workers, "file")
        for digest, shard in zip(found, shards):
            if digest != shard["sha256"]:
                say("damaged", f"{shard['file']}: its SHA-256 is not that of manifest.json; pack it again")
    for i, result in enumerate(in_parallel(look, range(len(names)), args.workers, "item")):
        if isinstance(result, InputError):
            say("unreadable", result)
            continue
        digest, sizes[i] = result
        if (first := seen.setdefault(digest, i)) != i:
            say("duplicate", f"{names[i]} holds the same as {names[first]}")
    common, count = collections.Counter(sizes.values()).most_common(1)[0] if sizes else (None, 0)
    for i, size in sizes.items():
        if args.least and min(size) < args.least:
            say("wrong size", f"{names[i]}: {' x '.join(map(str, size))}; expected at least {args.least}")
        elif not args.least and size != common and count >= 0.9 * len(sizes):
            say("wrong size", f"{names[i]}: {' x '.join(map(str, size))}; most are {' x '.join(map(str, common))}")
    for name, count in sorted(collections.Counter(classes).items()):
        print(f"{printable(name)}: {count}")
    print(f"{args.path}: {len(names)} items; "
          + (", ".join(f"{count} {what}" for what, count in wrong.items()) or "nothing wrong"))
    return 1 if wrong else 0


NO_CLASS = "no class"      # what check calls it


def contents(path):
    """What is in any set on disk: (function of i -> (digest, size) of an item, its names, its class names)."""
    if is_packed(path):
        source = Packed(path)
        look = functools.partial(look_packed, source)
        return look, source.files, [source.class_names[k] if source.class_names else NO_CLASS for k in source.labels]
    if is_archive(path) or os.path.isdir(path) and find_files(path, EXTENSIONS):
        source = Folder(path, 1)
        kinds = [source.class_names[k] if source.class_names else NO_CLASS for k in source.labels]
        if (skipped := len(picture_names(path)) - len(source)):
            print(f"{path}: train/ is checked, as it is what training reads; the other {skipped} pictures are not")
        return functools.partial(look_picture, path, source.names), source.files, kinds
    if not os.path.isdir(path) and not (os.path.isfile(path) and path.endswith((".pt", ".pth", ".hdf5", ".h5"))):
        raise InputError(f"{path}: no such set; expected pictures, clouds, or a packed set, as train.py reads them")
    kind, splits, sources, kinds = ShapeNet, list(SPLITS), [], []
    if os.path.isdir(path) and find_files(path, {".npz"}):
        kind, splits = Objaverse, [split for split in SPLITS if os.path.isdir(os.path.join(path, split))] or ["train"]
    elif path.endswith((".pt", ".pth")):
        splits = ["val"]
    for split in splits:
        try:
            source = kind(path, 1, split, **dict(labels=True) if kind is ShapeNet else {})
        except EmptySplit:
            continue
        labels = source.labels if source.class_names else [0] * len(source)
        kinds += [f"{(source.class_names or [NO_CLASS])[k]} {split}" for k in labels]
        sources.append(source)
    places = [(source, i) for source in sources for i in range(len(source))]
    return functools.partial(look_cloud, places), [source.files[i] for source, i in places], kinds


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def look_packed(source, i):
    pixels = source.item(i)[0]
    return hashlib.sha256(pixels).digest(), pixels.shape[1::-1]


def look_picture(path, names, i):
    return hashlib.sha256(picture_bytes(path, names[i])).digest(), open_picture(path, names[i]).size


def look_cloud(places, i):
    source, i = places[i]
    cloud = source.whole(i)
    return hashlib.sha256(np.ascontiguousarray(cloud)).digest(), (len(cloud),)


def stats(args):
    """Hands over to evaluate.py's reference statistics."""
    try:
        import evaluate
    except ImportError:
        raise InputError("stats: needs evaluate.py of this project beside data.py") from None
    try:
        evaluate.stats(["--data", args.path, *args.rest])
    except ValueError as error:                       # its InputError is that of the imported data.py, not of this script
        raise InputError(str(error)) from None


def mesh_jobs(args):
    """The surfaces of SRC as (source, split, class, name): files of a directory, or the solids, `solids:SPLIT`."""
    kind, _, split = args.src.partition(":")
    if kind == "solids" and not os.path.exists(args.src):
        if args.splits or args.val:
            raise InputError(f"{args.src}: has its split in its name; --splits and --val are for directories of meshes")
        solids, split = Solids(1, split or "train"), split or "train"
        return [((split, i), split, solids.class_names[i % len(solids.class_names)], f"{i:06d}") for i in range(args.n or 1)]
    if not 0 <= args.val <= 1:
        raise InputError(f"--val {args.val}: expected a share between 0 and 1")
    if not os.path.isdir(args.src):
        raise InputError(f"{args.src}: no such directory; expected one of meshes ({' '.join(MESHES)}), or solids[:SPLIT]")
    official, jobs, taken, named = read_splits(args.splits) if args.splits else {}, [], {}, 0
    for file in find_files(args.src, set(MESHES))[:args.n]:
        parts = os.path.splitext(os.path.relpath(file, args.src))[0].split(os.sep)
        parts = [part for part in parts if part not in ("models", "model_normalized")] or parts[-1:]      # ShapeNetCore's
        here = [part for part in parts[:-1] if part in SPLITS]
        parts = [part for part in parts if part not in here]
        name = "-".join(parts[1:] or parts)
        share = int.from_bytes(hashlib.sha256(os.fsencode("/".join(parts))).digest()[:4], "big") / 2 ** 32
        named += parts[-1] in official
        split = here[0] if here else official.get(parts[-1]) or ("val" if share < args.val else "train")
        kind = parts[0] if len(parts) > 1 else "objects"
        if (split, kind, name) in taken:              # link.obj beside link.stl
            name += os.path.splitext(file)[1].replace(".", "-")
        if (split, kind, name) in taken:
            raise InputError(f"{file}: would be written where {taken[split, kind, name]} is; expected names that differ")
        taken[split, kind, name] = file
        jobs.append((file, split, kind, name))
    if not jobs:
        raise InputError(f"{args.src}: no meshes in it; expected files of {' '.join(MESHES)}")
    if args.splits and not named:
        raise InputError(f"--splits {args.splits}: none of its modelIds is a mesh of {args.src}")
    return jobs


def read_splits(path):
    """modelId -> split of ShapeNet's own all.csv (id,synsetId,subSynsetId,modelId,split)."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {row["modelId"]: row["split"] for row in csv.DictReader(file) if split_code(row["split"]) is not None}
    except (OSError, KeyError, csv.Error, ValueError) as error:
        raise InputError(f"--splits {path}: expected a table with the columns modelId and split ({one_line(error)})") from None


def surface(source):
    """Triangles and colours of what a job names."""
    return (Solids(1, source[0]).surface(source[1]), None) if isinstance(source, tuple) else read_mesh(source)


def points_of(triangles, count, job):
    """Points uniform by area, drawn by a generator of the job's split, class and name alone."""
    with np.errstate(over="ignore"):
        cloud = on_surface(triangles, np.random.default_rng((SURFACE, *os.fsencode("/".join(job[1:])))).random((count, 3)))
    if not np.isfinite(cloud).all() or count > 1 and not np.ptp(cloud, 0).any():
        raise InputError(f"{job[0]}: its coordinates are too large or too small for float32; expected a surface in other units")
    return cloud


def there_already(path, count, size=None):
    """Whether a cloud is there; raises InputError where it is of another count, or the view beside it of another size."""
    if not os.path.exists(path):
        return False
    try:
        found = len(read_cloud(path))
    except InputError as error:
        raise InputError(f"{path}: {error}; delete it, or give another directory") from None
    if found != count:
        raise InputError(f"{path}: has {found} points; expected {count}, or another directory")
    if size and (found := read_image(path.removesuffix(".npy") + "-0.png").size[0]) != size:
        raise InputError(f"{path}: its views are of {found} pixels; expected {size}, or another directory")
    return True


def sample_mesh(job, dst, count):
    """Writes dst/class/split/name.npy, float32 (count,3), in the units of the mesh, or says that it is there already."""
    _, split, kind, name = job
    path = os.path.join(dst, kind, split, name + ".npy")
    if there_already(path, count):
        return "there"
    cloud = points_of(surface(job[0])[0], count, job)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomic(path, lambda file: np.save(file, cloud))


def render_mesh(job, dst, count, size):
    """Writes dst/split/class/name-0.png, -1.png and the cloud name.npy, float32 (count,3), in [-1,1]; the cloud last."""
    source, split, kind, name = job
    stem = os.path.join(dst, split, kind, name)
    if there_already(stem + ".npy", count, size):
        return "there"
    triangles, colours = surface(source)
    triangles = normalise(triangles.reshape(-1, 3))[0].astype(np.float64).reshape(-1, 3, 3)
    views = render(triangles / np.linalg.norm(triangles, axis=2).max(), colours, size)
    os.makedirs(os.path.dirname(stem), exist_ok=True)
    for i, view in enumerate(views):
        write_atomic(f"{stem}-{i}.png", lambda file: Image.fromarray(view).save(file, format="PNG"))
    write_atomic(stem + ".npy", lambda file: np.save(file, points_of(triangles, count, job)))


def over_meshes(task, args, **options):
    """Runs a task over the meshes of SRC; those that cannot be read end the run, or with --skip-bad are listed."""
    jobs, kinds, there = mesh_jobs(args), collections.Counter(), 0
    os.makedirs(args.dst, exist_ok=True)
    with only_one(args.dst):
        results = in_parallel(functools.partial(task, dst=args.dst, count=args.points, **options), jobs, args.workers, "mesh")
        for result, (_, split, kind, _) in zip(results, jobs):
            if not isinstance(result, InputError):
                kinds[kind, split] += 1
                there += result == "there"
            elif args.skip_bad:
                tqdm.write(f"left out: {result}")
            else:
                raise InputError(f"{result}; what is done is kept, --skip-bad leaves such files out")
    for (kind, split), count in sorted(kinds.items()):
        print(f"{printable(kind)}{f' ({CATEGORIES[kind]})' if kind in CATEGORIES else ''} {split}: {count}")
    print(f"{kinds.total()} of {len(jobs)} meshes in {args.dst}" + (f", {there} of them were there already" if there else f", {args.points} points each"))


def sample_meshes(args):
    over_meshes(sample_mesh, args)


def render_meshes(args):
    over_meshes(render_mesh, args, size=args.size)


def views_of(stem, size):
    """The views and the cloud that `render` wrote."""
    views = read_views([f"{stem}-{i}.png" for i in range(len(EYES))], size)
    try:
        cloud = np.array(read_cloud(stem + ".npy"))
        normalise(cloud)
        return views, cloud
    except InputError as error:
        raise InputError(f"{stem}.npy: {error}; expected what data.py render wrote") from None


def tokens(args):
    """Writes dst/....npz of `xyz` and `cond_token` (float16) for every object that `render` wrote to src."""
    if args.size % PATCH:
        raise InputError(f"--size {args.size}: expected a multiple of the patch, {PATCH}")
    stems = [file.removesuffix("-0.png") for file in find_files(args.src, {".png"}) if file.endswith("-0.png")]
    if not stems:
        raise InputError(f"{args.src}: no views in it; expected the directory that data.py render wrote")
    for flag, value, default in (("weights", args.weights, None), ("device", args.device, "cpu")):
        if args.features == "patches" and value != default:
            raise InputError(f"--{flag} {value}: does not apply to --features patches")
    extract, digest = FEATURES[args.features](args.weights, args.device)
    spec = dict(features=args.features, size=args.size, views=len(EYES), weights_sha256=digest)
    if (there := read_spec(args.dst)) not in (None, spec):
        raise InputError(f"{args.dst}: holds tokens of another setting ({there}); give another directory")
    os.makedirs(args.dst, exist_ok=True)
    with only_one(args.dst):
        out = {stem: os.path.join(args.dst, os.path.relpath(stem, args.src)) + ".npz" for stem in stems}
        todo = [stem for stem in stems if not os.path.exists(out[stem])]
        for result, stem in zip(in_parallel(functools.partial(views_of, size=args.size), todo, args.workers, "object"), todo):
            if isinstance(result, InputError):
                raise result
            if there is None:
                write_json(os.path.join(args.dst, "tokens.json"), there := spec)
            found = picture_tokens(result[0], extract).astype(np.float16)
            os.makedirs(os.path.dirname(out[stem]), exist_ok=True)
            write_atomic(out[stem], lambda file: np.savez(file, xyz=result[1], cond_token=found))
    print(f"{len(stems)} objects in {args.dst}{f' ({len(stems) - len(todo)} were there)' if len(todo) < len(stems) else ''}: {args.features}, {len(EYES)} views of {(args.size // PATCH) ** 2} tokens each")


def parser():
    def at_least(low):
        def number(text):
            if not text.isdecimal() or int(text) < low:
                raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, not {text!r}")
            return int(text)
        return number

    def directory(text):
        if not text or os.path.exists(text) and not os.path.isdir(text):
            raise argparse.ArgumentTypeError(f"expected a directory to write, not {text!r}")
        return text

    p = argparse.ArgumentParser(prog="data.py", description="Makes sets ready once, ahead of training.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def command(name, run, help, *paths):
        c = commands.add_parser(name, help=help, description=help)
        c.set_defaults(run=run)
        for path, what in paths:
            c.add_argument(path, help=what, type=directory if path == "dst" else str)
        c.add_argument("--workers", type=at_least(0), default=cores, help=f"processes (default: one a core, {cores})")
        return c

    pictures = "src", "directory of pictures as training reads it, a .zip of one, or LSUN's lmdb"
    c = command("pack", pack, "write a picture set once, cropped and resized, in few large files", pictures,
                ("dst", "directory to write; a run that was interrupted goes on"))
    c.add_argument("--res", type=at_least(1), required=True, help="side of the packed pictures")
    c.add_argument("--no-labels", action="store_true", help="sub-directories are no classes (those of FFHQ)")
    c = command("check", check, "list unreadable, duplicate and wrong-size files of any set, and count its classes; status 1 where there are any",
                ("path", "directory, .zip, lmdb or packed set of pictures; clouds as --dataset shapenet or objaverse reads them"))
    c.add_argument("--least", type=at_least(1), metavar="N", help="wrong is a picture whose shorter side is below N pixels, or a cloud "
                   "of fewer points (default: another size than 90 %% have)")
    command("stats", stats, "reference statistics; all other flags go to evaluate.py stats (--res, --out, ...)",
            ("path", "whatever evaluate.py stats takes as --data"))
    meshes = "src", f"directory of meshes ({' '.join(MESHES)}), or solids:SPLIT, built in"
    for name, run, help, points in (
            ("sample-meshes", sample_meshes, "points of meshes, uniform by area, as PointFlow's tree DST/CLASS/SPLIT/NAME.npy", 15000),
            ("render", render_meshes, "two views and a cloud of every mesh: DST/SPLIT/CLASS/NAME-0.png, -1.png, .npy", 32768)):
        c = command(name, run, help, meshes, ("dst", "directory to write; what is there already is kept"))
        c.add_argument("--points", type=at_least(1), default=points, help=f"per mesh (default: {points})")
        c.add_argument("--n", type=at_least(1), help="only the first so many (of solids default: 1)")
        c.add_argument("--splits", metavar="CSV", help="ShapeNet's all.csv; else directories named train, val, test count")
        c.add_argument("--val", type=float, default=0.0, help="else: share of the objects set aside as val (default: 0)")
        c.add_argument("--skip-bad", action="store_true", help="list meshes that cannot be read and go on")
        if name == "render":
            c.add_argument("--size", type=at_least(1), default=448, help="side of a view in pixels (default: 448)")
    c = command("tokens", tokens, "condition tokens of rendered views, with their clouds: what --dataset objaverse reads",
                ("src", "directory written by render"), ("dst", "directory to write; what is there already is kept"))
    c.add_argument("--features", choices=FEATURES, default="dinov2", help="of each patch of 14 x 14 pixels (default: dinov2)")
    c.add_argument("--weights", help="DINOv2 state dict, or torch.hub directory (default: torch.hub's own)")
    c.add_argument("--size", type=at_least(PATCH), default=448, help="side to which views are resized (default: 448)")
    c.add_argument("--device", default="cpu", help="for the features (default: cpu)")
    return p


def main(argv=None):
    p = parser()
    args, rest = p.parse_known_args(argv)
    if rest and args.run is not stats:
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    return args.run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")      # file names need not be text
    try:
        sys.exit(main())
    except (InputError, OSError, MemoryError) as problem:
        tqdm.write(f"data.py: {message(problem)}", file=sys.stderr)     # on a line of its own, also beside a progress bar
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
