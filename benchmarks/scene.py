"""The street corner of the sample clip, painted with numpy and Pillow from one generator of random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORLD = (3200, 1900)  # the painted wall, in pixels of the view at zoom 1
SUN = np.array([-0.45, -0.6, 0.66])  # from the upper left

Color = tuple[int, int, int]
Array = NDArray[np.float32]
Point = tuple[float, float]


def noise(rng: np.random.Generator, size: tuple[int, int], cell: float, octaves: int = 4) -> Array:
    """Smooth noise in about [-1, 1], coarsest at `cell` pixels, each octave twice as fine and half as strong."""
    total = np.zeros((size[1], size[0]), np.float32)
    for octave in range(octaves):
        step = cell / 2**octave
        shape = (max(2, round(size[1] / step)), max(2, round(size[0] / step)))
        grid = Image.fromarray(rng.uniform(-1, 1, shape).astype(np.float32))
        total += np.asarray(grid.resize(size, Image.Resampling.BICUBIC)) / 2**octave
    return total / 1.6


def lit(color: Array, height: Array, strength: float) -> Array:
    """`color` (H, W, 3) as a surface of the given relief (H, W) under the sun."""
    dy, dx = np.gradient(height * strength)
    shade = (SUN[2] - dx * SUN[0] - dy * SUN[1]) / np.sqrt(1 + dx**2 + dy**2) / SUN[2]
    return color * np.clip(shade, 0.35, 1.5)[..., None]


def to_image(pixels: Array) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def brick_wall(rng: np.random.Generator) -> Image.Image:
    width, height = WORLD
    brick_w, brick_h, mortar = 208, 70, 10
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x += 3 * noise(rng, WORLD, 90, 3)  # no edge of a laid brick is straight
    y += 3 * noise(rng, WORLD, 70, 3)
    row = np.floor(y / brick_h).astype(int)
    across = x + np.where(row % 2 == 0, 0, brick_w / 2)
    column = np.floor(across / brick_w).astype(int)
    inside_x, inside_y = across - column * brick_w, y - row * brick_h
    edge = np.minimum(np.minimum(inside_x, brick_w - inside_x), np.minimum(inside_y, brick_h - inside_y))
    body = np.clip((edge - mortar / 2) / 5, 0, 1)
    tints = rng.normal(0, 1, (64, 64, 2))
    tint = tints[row % 64, column % 64].astype(np.float32)
    fine, coarse = noise(rng, WORLD, 14, 3), noise(rng, WORLD, 260, 4)
    clay = np.array([150, 88, 68], np.float32) * (1 + 0.10 * tint[..., :1] + 0.13 * fine[..., None])
    clay += tint[..., 1:] * np.array([4, 9, 10], np.float32)
    joint = np.array([176, 166, 150], np.float32) * (1 + 0.08 * fine[..., None])
    color = joint + (clay - joint) * body[..., None]
    relief = 6 * body + 3 * fine * body + 1.2 * noise(rng, WORLD, 6, 2)
    return to_image(lit(color, relief, 0.16) * (0.94 + 0.12 * coarse[..., None]))


def planks(rng: np.random.Generator, size: tuple[int, int], color: Color, board: int) -> Image.Image:
    """Painted vertical boards with grain."""
    grain = noise(rng, (size[0], max(2, size[1] // 14)), 9, 3)
    grain = np.asarray(Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC))
    x = np.arange(size[0]) % board
    groove = np.minimum(np.minimum(x, board - x) / 5, 1).astype(np.float32)
    base = np.array(color, np.float32) * (1 + 0.10 * grain[..., None])
    return to_image(lit(base, 4 * groove[None] + 1.6 * grain, 0.3))


def pavement(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Slabs that run towards a vanishing point."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    depth = 120 / (y + 130)
    u, v = (x - size[0] / 2) * depth / 170, 7.5 * depth
    slab = np.stack([np.floor(u + 0.5 * (np.floor(v) % 2)), np.floor(v)])
    joint_u = np.abs((u + 0.5 * (slab[1] % 2)) % 1 - 0.5) * 2
    joint_v = np.abs(v % 1 - 0.5) * 2
    joint = np.clip((1 - np.maximum(joint_u, joint_v)) * 30, 0, 1)
    tint = rng.normal(0, 1, (97,)).astype(np.float32)[(slab[0] * 31 + slab[1] * 57).astype(int) % 97]
    fine = noise(rng, size, 10, 3)
    color = np.array([150, 143, 134], np.float32) * (1 + 0.06 * tint + 0.13 * fine)[..., None]
    return to_image(color * (0.55 + 0.45 * joint[..., None]))


def awning(size: tuple[int, int], stripes: int, drop: int) -> Image.Image:
    """Woven cloth in stripes with folds and a scalloped lower edge; RGBA."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    stripe = size[0] / stripes
    red = (np.floor(x / stripe) % 2 == 0)[..., None]
    color = np.where(red, np.array([186, 44, 40], np.float32), np.array([240, 228, 204], np.float32))
    weave = 0.05 * np.sin(x * 2 * math.pi / 10) * np.sin(y * 2 * math.pi / 10)
    folds = 0.10 * np.sin(x / stripe * math.pi) ** 2 - 0.10
    hem = size[1] - drop
    shade = np.where(y < hem, 0.80 + 0.32 * y / hem, 0.86) + weave + folds
    color = color * shade[..., None]
    color[hem - 4 : hem + 2] *= 0.7
    scallop = hem + drop * (0.45 + 0.55 * np.abs(np.sin(x / stripe * math.pi)))
    alpha = np.where(y < scallop, 255, 0).astype(np.float32)
    return to_image(np.dstack([color, alpha]))


def leaf(draw: ImageDraw.ImageDraw, at: Point, size: float, angle: float, color: Color) -> None:
    """One heart-shaped leaf: lit half, shaded half, veins."""
    cos, sin = math.cos(angle), math.sin(angle)

    def place(along: float, across: float) -> Point:
        return at[0] + size * (along * cos - across * sin), at[1] + size * (along * sin + across * cos)

    outline = [(0.0, 0.0), (-0.12, 0.22), (0.02, 0.44), (0.3, 0.46), (0.55, 0.3), (0.8, 0.12), (1.0, 0.0)]
    tones = [tuple(int(c * gain) for c in color) for gain in (1.14, 0.84, 1.32)]
    draw.polygon([place(a, -b) for a, b in outline], fill=tones[0])
    draw.polygon([place(a, b) for a, b in outline], fill=tones[1])
    draw.line([place(0, 0), place(0.95, 0)], fill=tones[2], width=max(2, round(size / 24)))
    for start, reach in ((0.12, 0.34), (0.34, 0.3), (0.56, 0.18)):
        for side in (-1, 1):
            vein = [place(start, 0), place(start + 0.18, side * reach)]
            draw.line(vein, fill=tones[2], width=max(1, round(size / 40)))


def foliage(
    rng: np.random.Generator, density: Callable[[float, float], float], count: int, sizes: tuple[float, float]
) -> Image.Image:
    """Leaves where `density` (of x and y in the world) allows, those below darker; RGBA."""
    layer = Image.new("RGBA", WORLD)
    draw = ImageDraw.Draw(layer)
    for index in range(count):
        x, y = rng.uniform(-40, WORLD[0]), rng.uniform(-40, WORLD[1])
        size, angle = rng.uniform(*sizes), rng.normal(math.pi / 2, 0.7)
        depth = 0.45 + 0.55 * index / count
        color = (
            np.array([72, 104, 48]) + rng.normal(0, 1, 3) * (11, 12, 8) + rng.uniform(0, 22) * np.array([1, 0.8, 0.4])
        )
        if rng.uniform() < density(x, y):
            red, green, blue = (int(c) for c in np.clip(color * depth, 8, 230))
            leaf(draw, (x, y), size, angle, (red, green, blue))
    return layer


def paste(canvas: Image.Image, layer: Image.Image, at: tuple[int, int] = (0, 0), shadow: float = 0.5) -> None:
    """`layer` onto `canvas` with the soft shadow that the sun throws to its lower right."""
    layer = layer.convert("RGBA")
    if shadow:
        cast = Image.new("L", canvas.size)
        cast.paste(layer.getchannel("A"), (at[0] + 18, at[1] + 24))
        cast = cast.filter(ImageFilter.GaussianBlur(12)).point(lambda value: value * shadow)
        canvas.paste((18, 14, 20), (0, 0), cast)
    canvas.paste(layer, at, layer)


def write(
    image: Image.Image, at: Point, text: str, size: float, color: Color, bold: int = 0, anchor: str = "mm"
) -> None:
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text(at, text, fill=color, font=font, anchor=anchor, stroke_width=bold, stroke_fill=color)


def sign(rng: np.random.Generator) -> Image.Image:
    board = planks(rng, (1440, 250), (26, 66, 60), 1440)
    ImageDraw.Draw(board).rectangle((16, 16, 1423, 233), outline=(214, 178, 96), width=7)
    write(board, (726, 108), "CAFE MERIDIAN", 150, (8, 22, 20), 4)
    write(board, (720, 100), "CAFE MERIDIAN", 150, (240, 214, 140), 4)
    write(board, (720, 196), "coffee  -  fresh bread  -  second-hand books", 44, (226, 216, 190))
    return board


def poster(rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[:640, :450].astype(np.float32)
    sky = np.array([32, 52, 110], np.float32) + (y / 640)[..., None] * np.array([206, 92, -14], np.float32)
    sheet = to_image(sky * (1 + 0.03 * noise(rng, (450, 640), 60, 4)[..., None]))
    draw = ImageDraw.Draw(sheet)
    draw.ellipse((130, 220, 320, 410), fill=(250, 214, 120))
    for ridge, tone in ((360, (88, 50, 92)), (400, (54, 34, 74)), (440, (28, 22, 48))):
        peaks = [
            (float(px), ridge - 46 * abs(math.sin(px / 61 + ridge)) - 20 * math.sin(px / 23)) for px in range(0, 460, 6)
        ]
        draw.polygon([(0, 520), *peaks, (450, 520)], fill=tone)
    draw.rectangle((0, 500, 450, 640), fill=(238, 230, 212))
    write(sheet, (225, 82), "OPEN AIR", 84, (252, 240, 214), 2)
    write(sheet, (225, 164), "CINEMA", 100, (252, 240, 214), 3)
    write(sheet, (225, 538), "Saturday 21:30", 50, (30, 26, 40), 1)
    write(sheet, (225, 588), "Harbour Square, free entry", 30, (70, 60, 70))
    write(sheet, (225, 620), "bring a blanket - 35 mm prints - rain or shine", 18, (90, 84, 90))
    framed = Image.new("RGB", (486, 676), (228, 222, 208))
    framed.paste(sheet, (18, 18))
    return framed


def window(rng: np.random.Generator, size: tuple[int, int], panes: int) -> Image.Image:
    """Glass with warm lamps and shelves behind it, the sky's reflection in front, in a painted frame."""
    room = np.zeros((size[1], size[0], 3), np.float32) + np.array([46, 34, 28], np.float32)
    inside = to_image(room * (1 + 0.3 * noise(rng, size, 300, 3)[..., None]))
    draw = ImageDraw.Draw(inside)
    for shelf in range(size[1] // 3, size[1], 150):
        left = 20.0
        while left < size[0] - 40:
            wide, tall = rng.uniform(14, 34), rng.uniform(70, 118)
            spine = tuple(int(c) for c in np.array([104, 76, 62]) * rng.uniform(0.5, 1.3) + rng.normal(0, 14, 3))
            draw.rectangle((left, shelf + 128 - tall, left + wide, shelf + 128), fill=spine)
            draw.line(
                (left + 3, shelf + 128 - tall * 0.7, left + wide - 3, shelf + 128 - tall * 0.7),
                fill=(206, 180, 120),
                width=3,
            )
            left += wide + 2
        draw.rectangle((0, shelf + 128, size[0], shelf + 140), fill=(96, 62, 38))
    glow = Image.new("RGB", size)
    for lamp in range(panes):
        cx, cy = round((lamp + 0.5) * size[0] / panes), 110
        ImageDraw.Draw(glow).ellipse((cx - 130, cy - 110, cx + 130, cy + 130), fill=(120, 76, 26))
    glow = glow.filter(ImageFilter.GaussianBlur(60))
    pixels = np.asarray(inside, np.float32) + np.asarray(glow, np.float32)
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    pixels += 26 * np.clip(np.sin((x + 0.8 * y) / 190), 0, 1)[..., None] * np.array([0.7, 0.85, 1], np.float32)
    image = to_image(pixels)
    draw = ImageDraw.Draw(image)
    for lamp in range(panes):
        cx = round((lamp + 0.5) * size[0] / panes)
        draw.line((cx, 0, cx, 84), fill=(20, 16, 14), width=4)
        draw.polygon([(cx - 46, 128), (cx - 20, 82), (cx + 20, 82), (cx + 46, 128)], fill=(34, 60, 58))
        draw.ellipse((cx - 20, 114, cx + 20, 150), fill=(255, 232, 170))
    for bar in range(panes + 1):
        at = bar * size[0] / panes
        draw.rectangle((at - 12, 0, at + 12, size[1]), fill=(228, 218, 196))
        draw.line((at + 12, 0, at + 12, size[1]), fill=(120, 108, 92), width=4)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=(228, 218, 196), width=20)
    return image


def chalkboard(rng: np.random.Generator) -> Image.Image:
    dust = noise(rng, (330, 500), 120, 5)[..., None]
    board = to_image(np.array([44, 48, 50], np.float32) + 9 * dust)
    ImageDraw.Draw(board).rectangle((0, 0, 329, 499), outline=(140, 92, 52), width=20)
    chalk = (232, 230, 220)
    write(board, (165, 66), "TODAY", 62, (250, 206, 96), 2)
    menu = [("Espresso", "2.20"), ("Flat white", "3.40"), ("Lemon tart", "4.10"), ("Soup, toast", "5.60")]
    for line, (dish, price) in enumerate(menu):
        write(board, (34, 148 + 70 * line), dish, 36, chalk, anchor="lm")
        write(board, (298, 148 + 70 * line), price, 32, (170, 214, 200), anchor="rm")
    write(board, (165, 440), "dogs welcome", 36, (240, 160, 150))
    return board


def balloon() -> Image.Image:
    """RGBA, 300x760: a glossy balloon on a string."""
    y, x = np.mgrid[:760, :300].astype(np.float32)
    dx, dy = (x - 150) / 138, (y - 160) / np.where(y < 160, 150, 172)
    radius = np.sqrt(dx**2 + dy**2)
    normal_z = np.sqrt(np.clip(1 - radius**2, 0, 1))
    diffuse = np.clip(-(dx * SUN[0] + dy * SUN[1]) * -1 + normal_z * SUN[2], 0, 1)
    gloss = np.exp(-((dx + 0.38) ** 2 + (dy + 0.45) ** 2) / 0.03)
    color = np.array([30, 118, 196], np.float32) * (0.42 + 0.75 * diffuse)[..., None] + 190 * gloss[..., None]
    alpha = np.clip((1 - radius) * 120, 0, 1) * 246
    image = to_image(np.dstack([color, alpha]))
    draw = ImageDraw.Draw(image)
    draw.polygon([(150, 322), (134, 352), (166, 352)], fill=(22, 84, 150, 255))
    string = [(150 + 10 * math.sin(t / 46), 350.0 + t) for t in range(0, 400, 8)]
    draw.line(string, fill=(236, 232, 224, 255), width=4)
    return image


def paint_world(rng: np.random.Generator) -> Image.Image:
    world = brick_wall(rng)
    ground = 1600
    world.paste(pavement(rng, (WORLD[0], WORLD[1] - ground)), (0, ground))
    paste(world, planks(rng, (1400, 180), (30, 74, 68), 116), (1120, 1420), 0.4)
    paste(world, window(rng, (860, 640), 3), (1130, 790), 0)
    paste(world, window(rng, (380, 800), 1), (2110, 790), 0.4)
    write(world, (1560, 1290), "BOOKS & BREAD", 78, (244, 236, 214), 1)
    write(world, (2300, 1060), "OPEN", 92, (250, 240, 220), 2)
    write(world, (2300, 1136), "7:00 - 19:00", 46, (250, 240, 220))
    paste(world, awning((1500, 260), 18, 70), (1070, 590), 0.62)
    paste(world, sign(rng), (1100, 340), 0.5)
    paste(world, poster(rng), (520, 700), 0.5)

    def ivy(x: float, y: float) -> float:
        left = 430 + 130 * math.sin(y / 170) + 60 * math.sin(y / 61) - 0.12 * y
        top = 190 + 70 * math.sin(x / 210) + 50 * math.sin(x / 67)
        right = 2960 + 70 * math.sin(y / 120)
        return 0.9 if x < left or y < top or x > right else 0.03 if x < left + 90 or y < top + 70 else 0.0

    def box(x: float, y: float) -> float:
        return max(float(math.hypot((x - cx) / 150, (y - 1430) / 170) < 1) for cx in (1130, 2050))

    paste(world, foliage(rng, ivy, 15000, (34, 78)), (0, 0), 0.6)
    paste(world, chalkboard(rng), (2600, 1160), 0.5)
    for left in (1070, 1990):
        paste(world, planks(rng, (130, 120), (150, 84, 52), 130), (left, 1560), 0.5)
    paste(world, foliage(rng, box, 26000, (20, 40)), (0, 0), 0.5)
    light = 1.02 + 0.16 * noise(rng, WORLD, 520, 3)[..., None]
    return to_image(np.asarray(world, np.float32) * light)
