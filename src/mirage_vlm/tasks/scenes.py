"""Scenes that are drawn from their number: stand-ins for photos, with places that can be told apart.

Whole numbers alone, and no sums whose order could matter: every machine draws the same bytes.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import PIL.Image

WIDTH, HEIGHT = 480, 320
Colour = tuple[int, int, int]
Point = tuple[int, int]  # x, y in pixels


@lru_cache(maxsize=64)
def draw_scene(name: str) -> PIL.Image.Image:
    """The scene of that name: one of `SCENES`, by chance, as is all that is on it."""
    rng = random.Random(f"scene/{name}")
    canvas = Canvas(rng)
    rng.choice(SCENES)(canvas)
    return PIL.Image.fromarray(canvas.pixels.clip(0, 255).astype(np.uint8))


def noise(rng: random.Random, period: int) -> np.ndarray:
    """Smooth noise: chance values every `period` pixels and smooth steps between. [HEIGHT, WIDTH] in 0 … 255."""
    rows, columns = HEIGHT // period + 2, WIDTH // period + 2
    grid = np.frombuffer(rng.randbytes(rows * columns), np.uint8).reshape(rows, columns).astype(np.int32)
    y, above = np.divmod(np.arange(HEIGHT, dtype=np.int32)[:, None], period)
    x, before = np.divmod(np.arange(WIDTH, dtype=np.int32), period)
    below, after = (step * step * (3 * period - 2 * step) for step in (above, before))  # 0 … period ** 3
    down = (grid[y[:, 0]] * (period**3 - below) + grid[y[:, 0] + 1] * below) // period**3  # [HEIGHT, columns]
    return (down[:, x] * (period**3 - after) + down[:, x + 1] * after) // period**3


def rough(rng: random.Random, period: int) -> np.ndarray:
    """Noise of three octaves. [HEIGHT, WIDTH] in 0 … 255."""
    first, second, third = (noise(rng, max(2, period // part)) for part in (1, 2, 4))
    return (4 * first + 2 * second + third) // 7


def mixed(one: Colour, other: Colour, weight: np.ndarray | int) -> np.ndarray:
    """From one colour (weight 0) to another (255). weight [...] -> [..., 3]."""
    share = np.asarray(weight)[..., None]
    return (np.array(one, np.int32) * (255 - share) + np.array(other, np.int32) * share) // 255


class Canvas:
    """A picture to paint on.

    Attributes:
        pixels: [HEIGHT, WIDTH, 3] whole numbers, which may leave 0 … 255 until the end.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.pixels = np.zeros((HEIGHT, WIDTH, 3), np.int32)
        self.y, self.x = np.mgrid[:HEIGHT, :WIDTH].astype(np.int32)

    def colour(self, low: int = 30, high: int = 235) -> Colour:
        return self.rng.randint(low, high), self.rng.randint(low, high), self.rng.randint(low, high)

    def near(self, colour: Colour, by: int = 25) -> Colour:
        """A colour much like another."""
        red, green, blue = (min(250, max(5, part + self.rng.randint(-by, by))) for part in colour)
        return red, green, blue

    def cover(self, top: Colour, bottom: Colour) -> None:
        """From one colour at the top to another at the bottom."""
        self.pixels[:] = mixed(top, bottom, self.y * 255 // HEIGHT)

    def fill(self, inside: np.ndarray, colour: Colour, texture: np.ndarray) -> None:
        """Paint where `inside`, lighter and darker by `texture`; both [HEIGHT, WIDTH]."""
        shades = np.array(colour, np.int32) * (170 + texture * 2 // 3)[..., None] // 255
        np.copyto(self.pixels, shades, where=inside[..., None])

    def window(self, left: int, top: int, right: int, bottom: int) -> tuple[slice, slice]:
        """The part of a box that is on the picture."""
        across = slice(max(0, left), max(0, min(WIDTH, right + 1)))
        return slice(max(0, top), max(0, min(HEIGHT, bottom + 1))), across

    def ball(self, x: int, y: int, a: int, b: int, colour: Colour, shaded: bool = True) -> None:
        """An ellipse with half axes a and b, lit from the upper left."""
        part = self.window(x - a, y - b, x + a, y + b)
        dx, dy = self.x[part].astype(np.int64) - x, self.y[part].astype(np.int64) - y
        inside = dx * dx * b * b + dy * dy * a * a <= a * a * b * b
        away = ((2 * dx + a) ** 2 * b * b + (2 * dy + b) ** 2 * a * a) * 22 // (a * a * b * b)  # 0 at the brightest
        light = (330 - away).clip(70, 330) if shaded else np.full_like(dx, 256)
        self.pixels[part][inside] = np.array(colour, np.int32) * light[inside][:, None] // 256

    def shape(self, corners: list[Point], colour: Colour, fade: int = 0) -> tuple[tuple[slice, slice], np.ndarray]:
        """A convex shape, corners clockwise, `fade` % darker at the right. Returns its window and what it covers."""
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        part = self.window(min(xs), min(ys), max(xs), max(ys))
        x, y = self.x[part], self.y[part]
        inside = np.ones(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
        light = 100 - fade * (x - min(xs)) // max(1, max(xs) - min(xs))
        self.pixels[part][inside] = np.array(colour, np.int32) * light[inside][:, None] // 100
        return part, inside

    def block(self, left: int, top: int, right: int, bottom: int, colour: Colour, fade: int = 0) -> None:
        part = self.window(left, top, right, bottom)
        light = 100 - fade * (self.x[part] - left) // max(1, right - left)
        self.pixels[part] = np.array(colour, np.int32) * light[..., None] // 100


def hills(canvas: Canvas) -> None:
    """Ridge before ridge under a sky, with trees."""
    rng = canvas.rng
    sky = canvas.colour(110, 240)
    canvas.cover(canvas.near(sky, 60), canvas.near(sky, 40))
    sun = rng.randint(12, 30)
    canvas.ball(rng.randrange(WIDTH), rng.randrange(20, 120), sun, sun, (250, 240, 190), False)
    clouds = rough(rng, 64)[..., None]
    canvas.pixels += (250 - canvas.pixels) * (clouds - 120).clip(0, 110) // 140
    near, ridges = canvas.colour(25, 120), rng.randint(3, 5)
    for i in range(ridges):
        line = noise(rng, rng.randint(40, 110))[0] // 2 + noise(rng, 17)[0] // 10
        line = line - 128 + (i + 1) * HEIGHT // (ridges + 1) + 20
        red, green, blue = mixed(sky, near, 80 + 175 * i // (ridges - 1)).tolist()
        colour = canvas.near((red, green, blue), 18)
        canvas.fill(canvas.y >= line, colour, rough(rng, 18))
        for _ in range(rng.randint(0, 14) if i else 0):
            x, tall = rng.randrange(WIDTH), rng.randint(12, 22 + 12 * i)
            foot, leaf = int(line[x]) + rng.randint(2, 30), canvas.near((30, 90, 45), 25)
            canvas.block(x - 1, foot - tall // 3, x + 1, foot, (70, 50, 35))
            low = foot - tall // 4
            canvas.shape([(x, foot - tall), (x + tall // 3, low), (x - tall // 3, low)], leaf, 45)


def town(canvas: Canvas) -> None:
    """Houses with windows, one row before another, and a street."""
    rng = canvas.rng
    street = HEIGHT - rng.randint(25, 60)
    canvas.cover(canvas.colour(60, 230), canvas.colour(120, 240))
    canvas.fill(canvas.y >= street, canvas.colour(60, 120), rough(rng, 12))
    for x in range(rng.randrange(40), WIDTH, rng.randint(40, 60)):
        canvas.block(x, (street + HEIGHT) // 2, x + 22, (street + HEIGHT) // 2 + 4, (235, 230, 210))
    for row in range(2):
        x = -rng.randrange(40)
        while x < WIDTH:
            wide, tall = rng.randint(35, 95), rng.randint(60, 230 - 70 * row)
            wall, glass, lit = canvas.colour(50, 210), canvas.colour(20, 110), canvas.colour(190, 250)
            top = street - tall
            canvas.block(x, top, x + wide, street, wall, 35)
            if rng.random() < 0.5:
                ridge = (x + wide // 2, top - rng.randint(10, 35))
                canvas.shape([ridge, (x + wide, top), (x, top)], canvas.colour(40, 160), 30)
            step, rise = rng.randint(11, 22), rng.randint(14, 26)
            for left in range(x + 5, x + wide - step // 2 - 3, step):
                for up in range(top + 6, street - rise // 2 - 4, rise):
                    pane = lit if rng.random() < 0.3 else glass
                    canvas.block(left, up, left + step // 2, up + rise // 2, pane, 20)
            x += wide + rng.randint(0, 25)


def table(canvas: Canvas) -> None:
    """Balls, boxes and tins on a wooden table, before a papered wall."""
    rng = canvas.rng
    edge = rng.randint(90, 170)
    wall, other, stripe = canvas.colour(90, 230), canvas.colour(60, 200), rng.randint(10, 34)
    canvas.pixels[:] = np.where(((canvas.x + canvas.y // rng.randint(1, 6)) // stripe % 2)[..., None], wall, other)
    canvas.pixels -= canvas.x[..., None] // rng.randint(6, 14)
    grain = rough(rng, 90)
    rings = abs((grain * 6 + canvas.y * 3) % 120 - 60) * 4
    canvas.fill(canvas.y >= edge, canvas.near((165, 115, 70), 45), rings)
    for foot in sorted(rng.randint(edge + 20, HEIGHT + 25) for _ in range(rng.randint(7, 12))):
        x, size, colour = rng.randrange(WIDTH), rng.randint(16, 30) + (foot - edge) // 6, canvas.colour()
        part = canvas.window(x - size, foot - size // 4, x + size * 2, foot + size // 4)
        under = (2 * (canvas.x[part] - x) - size) ** 2 + (10 * (canvas.y[part] - foot)) ** 2 <= (3 * size) ** 2
        canvas.pixels[part][under] = canvas.pixels[part][under] * 55 // 100
        kind = rng.randrange(3)
        if kind == 0:
            canvas.ball(x, foot - size, size, size, colour)
        elif kind == 1:
            back, top = size // 2, foot - size
            red, green, blue = colour
            canvas.block(x - size, top, x, foot, colour)
            side = [(x, top), (x + back, top - back), (x + back, foot - back), (x, foot)]
            canvas.shape(side, (red * 6 // 10, green * 6 // 10, blue * 6 // 10))
            lid = [(x - size, top), (x - back, top - back), (x + back, top - back), (x, top)]
            canvas.shape(lid, (red * 12 // 10, green * 12 // 10, blue * 12 // 10))
        else:
            canvas.ball(x, foot, size * 2 // 3, size // 4, colour, False)
            canvas.block(x - size * 2 // 3, foot - size * 3 // 2, x + size * 2 // 3, foot, colour, 60)
            canvas.ball(x, foot - size * 3 // 2, size * 2 // 3, size // 4, canvas.near(colour, 50), False)


def meadow(canvas: Canvas) -> None:
    """Flowers and leaves on grass."""
    rng = canvas.rng
    canvas.fill(canvas.y >= 0, canvas.near((70, 120, 50), 40), rough(rng, rng.randint(8, 40)))
    for y in sorted(rng.randrange(HEIGHT + 20) for _ in range(rng.randint(40, 90))):
        x, size, leaf = rng.randrange(WIDTH), rng.randint(5, 9) + y // 40, canvas.near((60, 110, 50), 40)
        canvas.ball(x + rng.randint(-2, 2) * size, y + size, size * 2, size // 2 + 1, leaf)
        if rng.random() < 0.6:
            petal = canvas.colour(90, 250)
            for right, down in ((0, -8), (8, -3), (5, 7), (-5, 7), (-8, -3)):
                canvas.ball(x + right * size // 8, y + down * size // 8, size * 3 // 4, size * 3 // 4, petal)
            canvas.ball(x, y, size // 2, size // 2, canvas.near((220, 180, 40), 30))


def stones(canvas: Canvas) -> None:
    """A heap of stones of a few colours and many sizes."""
    rng = canvas.rng
    kinds = [canvas.colour(70, 210) for _ in range(rng.randint(2, 5))]
    canvas.fill(canvas.y >= 0, canvas.colour(20, 80), rough(rng, 10))
    largest = rng.randint(22, 48)
    for _ in range(4500 // largest):
        a, b = rng.randint(largest // 3, largest), rng.randint(largest // 3, largest)
        canvas.ball(rng.randrange(WIDTH), rng.randrange(HEIGHT), a, b, canvas.near(rng.choice(kinds), 22))
    canvas.pixels = canvas.pixels * (200 + rough(rng, 8) // 3)[..., None] // 245


def quilt(canvas: Canvas) -> None:
    """Cloths of stripes, checks and dots that lie over one another."""
    rng = canvas.rng
    canvas.fill(canvas.y >= 0, canvas.colour(), rough(rng, 30))
    for _ in range(rng.randint(14, 26)):
        x, y, wide, tall = rng.randint(-40, WIDTH), rng.randint(-40, HEIGHT), rng.randint(50, 170), rng.randint(50, 140)
        slant, step = rng.randint(-30, 30), rng.randint(5, 14)
        corners = [(x, y), (x + wide, y + slant), (x + wide - slant, y + tall + slant), (x - slant, y + tall)]
        part, cloth = canvas.shape(corners, canvas.colour(), 40)
        across, down = canvas.x[part], canvas.y[part]
        patterns = (
            (across + down * rng.randint(-2, 2)) // step % 3 == 0,
            (across // step + down // step) % 2 == 0,
            (across % (2 * step) - step) ** 2 + (down % (2 * step) - step) ** 2 < step * step // 2,
        )
        canvas.pixels[part][cloth & rng.choice(patterns)] = canvas.colour()


SCENES = (hills, town, table, meadow, stones, quilt)
