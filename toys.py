"""Toys: an endless set of images and one of point clouds that need no file, to run everything at once.

| class  | item                                             | class labels                                   |
|--------|--------------------------------------------------|------------------------------------------------|
| Glyphs | uint8 (R,R,3): one letter or digit, dark on pale | 36: A to Z, 0 to 9                             |
| Solids | float32 (P,3) in [-1,1]: points of a surface     | 7: table, chair, lamp, mug, bottle, airplane,  |
|        |                                                  | bookshelf, each of random proportions          |

In order: Glyphs, with the drawing of one letter; the parts that surfaces are built of (box, lathe, ...); the
seven shapes; Solids, with points uniform by area (on_surface). R image side, P points, T triangles.
"""
import colorsys
import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

# A seed is a tuple that begins with the number of its purpose, so that no two share a stream (data.py: 103).
ITEM, POINTS = 101, 102
SPLITS = {"train": 0, "val": 1, "test": 2}

def split_code(split):
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return SPLITS[split]

class Glyphs:
    """Letters and digits, dark on pale, one per image. `item` -> uint8 (R,R,3), class label i % 36.

    Item i is drawn in units of the image, so another `res` shows the same image finer or coarser.
    """
    domain = "image"
    HEIGHT = 0.66, 0.84       # of the inked box, in image heights
    ANGLE = -10.0, 10.0       # degrees
    MARGIN = 0.04             # kept free on every side, in image widths
    STROKE = 0.05             # added around the outline, in em: regular becomes bold
    PAPER = 0.80, 1.00        # each channel of the background
    SATURATION = 0.75, 1.00
    VALUE = 0.30, 0.65
    LUMA = 0.32               # upper bound of the ink's Rec. 601 luma: yellow must be as readable as blue
    EM = 1024                 # pixels per em of the drawing that all sizes are reduced from
    OVERSAMPLE = 4            # canvas pixels per image pixel, each way

    def __init__(self, res=32, split="train"):
        self.res, self.split = res, split_code(split)
        self.class_names = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
        if not features.check("freetype2"):
            raise ValueError("glyphs: needs a Pillow built with FreeType, whose scalable font is used")

    def __len__(self):
        return 2 ** 20

    def item(self, i, rng=None):
        """rng is not used: a mirrored letter is another letter."""
        return self.render(i), i % len(self.class_names)

    def render(self, i, res=None):
        """Image i at any resolution, uint8 (res,res,3)."""
        res = res or self.res
        over = max(1, min(self.OVERSAMPLE, self.EM // res))   # finer than the drawing shows nothing
        side, text = over * res, self.class_names[i % len(self.class_names)]
        letter, em, width, height = drawn_letter(text, max(1, self.EM // side))
        u = np.random.default_rng((ITEM, self.split, i)).random(10)

        # size, angle and place, in units of the image; the turned box stays inside the margin
        angle = math.radians(between(self.ANGLE, u[0]))
        cos, sin = math.cos(angle), math.sin(angle)
        reach_x = width * cos + height * abs(sin)
        reach_y = height * cos + width * abs(sin)
        room = 1 - 2 * self.MARGIN
        scale = min(between(self.HEIGHT, u[1]) / height, room / max(reach_x, reach_y))   # image widths per em
        x = 0.5 + (room - scale * reach_x) * (u[2] - 0.5)
        y = 0.5 + (room - scale * reach_y) * (u[3] - 0.5)

        # Pillow wants the map from canvas pixels back to drawing pixels
        step = em / (scale * side)
        a, b = step * cos, step * sin
        c = letter.width / 2 - side * (a * x + b * y)
        f = letter.height / 2 - side * (a * y - b * x)
        matrix = a, b, c, -b, a, f
        canvas = letter.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        ink = np.asarray(canvas.reduce(over), np.float32)[:, :, None] / 255

        paper = 255 * (self.PAPER[0] + (self.PAPER[1] - self.PAPER[0]) * u[4:7])
        colour = colorsys.hsv_to_rgb(u[7], between(self.SATURATION, u[8]), between(self.VALUE, u[9]))
        colour = np.array(colour) * (255 * min(1, self.LUMA / (np.array(colour) @ (0.299, 0.587, 0.114))))
        return (paper + ink * (colour - paper) + 0.5).astype(np.uint8)

@functools.lru_cache(maxsize=144)       # 36 glyphs at four resolutions
def drawn_letter(text, factor):
    """One glyph, drawn once at Glyphs.EM and reduced by an integer factor: (L image with the inked box at its
    centre, pixels per em, width and height of the box in em)."""
    font = ImageFont.load_default(Glyphs.EM)
    image, stroke = Image.new("L", (2 * Glyphs.EM, 2 * Glyphs.EM)), round(Glyphs.STROKE * Glyphs.EM)
    ImageDraw.Draw(image).text((Glyphs.EM // 2, Glyphs.EM // 2), text, 255, font, stroke_width=stroke)
    left, top, right, bottom = image.getbbox()
    width, height = right - left, bottom - top
    # sides divisible by 2 * factor, with two reduced pixels of zeros around: the centre stays the centre
    wide, high = (2 * factor * math.ceil(side / (2 * factor) + 2) for side in (width, height))
    left, top = left - (wide - width) / 2, top - (high - height) / 2
    shift = 1, 0, left, 0, 1, top
    image = image.transform((wide, high), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR)
    return image.reduce(factor), Glyphs.EM / factor, width / Glyphs.EM, height / Glyphs.EM

def between(bounds, u):
    """The number a share u of the way between two bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u

# Every shape is a list of triangles, (T,3,3), so that points uniform by area over the whole are one formula.
# x to the right, y up, z towards the viewer.

def box(centre, size):
    """Twelve triangles."""
    corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * size + centre
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return np.concatenate([corners[[(a, b, c), (a, c, d)]] for a, b, c, d in faces])

def grid(points):
    """Two triangles for every cell of an (m,n,3) sheet of points."""
    a, b, c, d = points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]
    return np.concatenate([np.stack(corners, 2).reshape(-1, 3, 3) for corners in ((a, b, c), (a, c, d))])

def lathe(profile, centre=(0, 0, 0), sides=48):
    """The (radius, y) profile turned about a vertical axis: discs, cylinders, cones and what joins them."""
    radius, y = np.array(profile, float).T[:, :, None]
    turn = np.linspace(0, 2 * np.pi, sides + 1)
    return grid(np.stack([radius * np.cos(turn), y + 0 * turn, radius * np.sin(turn)], 2)) + centre

def torus(centre, ring, tube, start, stop):
    """An arc of a torus in the xy plane, angles in radians from the x axis."""
    along, around = np.linspace(start, stop, 25)[:, None], np.linspace(0, 2 * np.pi, 13)
    out, z = ring + tube * np.cos(around), tube * np.sin(around) + 0 * along
    return grid(np.stack([out * np.cos(along), out * np.sin(along), z], 2)) + centre

def wing(root, span, chord, thick, sweep, taper):
    """A box along x from `root`, to the left if span < 0; its tip `sweep` back, its chord cut to `taper`."""
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
        foot = [(0, 0), (0.6 * half_z, 0), (0.6 * half_z, 0.04), (0.5 * leg, 0.06), (0.5 * leg, height)]
        return [lathe([(0, 0), (half_z, 0), (half_z, thick), (0, thick)], (0, height, 0)), lathe(foot)]
    return [box((0, height + thick / 2, 0), (2 * half_x, thick, 2 * half_z)),
            *legs(u[6], inset * half_x, inset * half_z, height, leg)]

def chair(u):
    seat, half, leg = between((0.42, 0.55), u[0]), between((0.22, 0.30), u[1]), between((0.03, 0.06), u[2])
    back, thick = between((0.35, 0.65), u[3]), between((0.03, 0.07), u[4])
    floor, behind, inset = seat + thick, thick / 2 - half, half - leg
    parts = [box((0, seat + thick / 2, 0), (2 * half, thick, 2 * half)), *legs(u[5], inset, inset, seat, leg)]
    if u[6] < 0.5:      # a board, or two posts and three slats
        parts.append(box((0, floor + back / 2, behind), (2 * half, back, thick)))
    else:
        posts = leg / 2 - half, half - leg / 2
        parts += [box((x, floor + back / 2, behind), (leg, back, thick)) for x in posts]
        slat = 2 * half - 2 * leg, 0.16 * back, thick
        parts += [box((0, floor + back * y, behind), slat) for y in (0.3, 0.6, 0.92)]
    if u[7] < 0.35:     # arms
        for x in (leg / 2 - half, half - leg / 2):
            parts.append(box((x, floor + 0.22, 0), (leg, 0.04, 2 * half)))
            parts.append(box((x, floor + 0.1, half - leg), (leg, 0.2, leg)))
    return parts

def lamp(u):
    foot, pole, shade = between((0.15, 0.28), u[0]), between((0.5, 1.3), u[1]), between((0.2, 0.42), u[2])
    high, rod = between((0.25, 0.45), u[4]), between((0.015, 0.04), u[5])
    top = shade * between((0.3, 1.0), u[3])
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
    body, reach, chord = between((0.08, 0.13), u[0]), between((0.7, 1.1), u[1]), between((0.22, 0.4), u[2])
    sweep, taper, tail = between((0.0, 0.5), u[3]), between((0.3, 0.8), u[4]), between((0.25, 0.4), u[5])
    profile = [(0, -1), (0.6 * body, -0.93), (body, -0.75), (body, 0.4), (0.25 * body, 1), (0, 1)]
    parts = [lathe(profile, sides=32)[:, :, [0, 2, 1]]]        # its axis laid along z, nose at -z
    fin = wing((0, 0, 0.85), tail, 0.22, 0.02, 0.15, 0.6)
    parts.append(fin[:, :, [1, 0, 2]])
    for side in (-1, 1):
        parts.append(wing((0, -0.3 * body, -0.1), side * reach, chord, 0.03, sweep, taper))
        parts.append(wing((0, 0.2 * body, 0.87), side * tail, 0.18, 0.02, 0.12, 0.6))
        if u[6] < 0.6:      # engines under the wing
            engine = lathe([(0, -0.12), (0.055, -0.12), (0.055, 0.12), (0, 0.12)], sides=16)[:, :, [0, 2, 1]]
            parts.append(engine + (side * 0.4 * reach, -0.3 * body - 0.06, 0.4 * sweep - 0.25))
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

class Solids:
    """Seven shapes of random proportions. `item` -> float32 (P,3) in [-1,1], class label i % 7.

    The box of the surface is normalised, not that of the points, so every draw from one shape agrees. rng
    draws the points; without it they depend on i alone, and a larger P only appends.
    """
    domain = "points"
    SHAPES = {f.__name__: f for f in (table, chair, lamp, mug, bottle, airplane, bookshelf)}

    def __init__(self, points=2048, split="train"):
        self.points, self.split = points, split_code(split)
        self.class_names = list(self.SHAPES)

    def __len__(self):
        return 2 ** 20

    def surface(self, i):
        """Shape i as float32 triangles (T,3,3), its box centred at the origin, the longest side on [-1,1]."""
        shape = self.SHAPES[self.class_names[i % len(self.class_names)]]
        triangles = np.concatenate(shape(np.random.default_rng((ITEM, self.split, i)).random(8)))
        low, high = triangles.min((0, 1)), triangles.max((0, 1))
        return ((triangles - (low + high) / 2) / ((high - low).max() / 2)).astype(np.float32)

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
