"""Draw the idea of transfer learning: docs/idea.png and .svg, and those in docs/ja.

    python tests/draw_idea.py

The Japanese ones need a Japanese font (Debian, Ubuntu: sudo apt install fonts-noto-cjk).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib import font_manager

DOCS = Path(__file__).resolve().parent.parent / "docs"
FONTS = ["Noto Sans CJK JP", "Yu Gothic", "Hiragino Sans", "IPAexGothic"]
BASE, OLD, NEW = "tab:blue", "tab:gray", "tab:orange"
BLOCKS = [2.0, 1.75, 1.5, 1.25, 1.0]  # heights of VGG16's five blocks: their grids shrink

ENGLISH = {
    "before": "VGG16, trained on ImageNet",
    "after": "Transfer learning with CIFAR-10",
    "photos": "1.2 million\nphotos",
    "images": "40,000\nimages",
    "block": "block {}",
    "old head": "old head\n4096, 4096, 1000",
    "off": "taken off",
    "old answer": "one of\n1,000 classes",
    "new head": "new head\n256, 10",
    "on": "put on",
    "new answer": "airplane, cat,\nship ...: 10 classes",
    "frozen": "frozen: the weights stay as ImageNet made them",
    "trained": "trained",
    "kept": "the base is kept",
}
JAPANESE = {
    "before": "ImageNet で訓練済みの VGG16",
    "after": "CIFAR-10 の転移学習",
    "photos": "写真\n120 万枚",
    "images": "画像\n4 万枚",
    "block": "ブロック {}",
    "old head": "元の分類層\n4096, 4096, 1000",
    "off": "取り外す",
    "old answer": "1,000 クラスの\nどれか",
    "new head": "新しい分類層\n256, 10",
    "on": "取り付ける",
    "new answer": "飛行機、猫、船…\n10 クラスのどれか",
    "frozen": "重みを固定（ImageNet で訓練したまま）",
    "trained": "訓練する",
    "kept": "ベースモデルはそのまま使う",
}


def draw_row(axis, middle, words, title, images, head, colour, note, answer):
    """Draw one network from left to right: images, VGG16's blocks, a head, the answer."""
    axis.text(0, middle + 1.55, words[title], fontsize=17, weight="bold", va="center")
    axis.text(0.55, middle, words[images], fontsize=13, ha="center", va="center")
    for number, height in enumerate(BLOCKS, start=1):
        x = 1.1 + 0.95 * number
        axis.bar(x, height, 0.75, middle - height / 2, color=BASE)
        text = words["block"].format(number)
        axis.text(x, middle, text, fontsize=10, color="white", ha="center", va="center")
        point(axis, x - 0.56, x - 0.4, middle)
    point(axis, 6.25, 6.6, middle)
    style = {"color": "white", "edgecolor": colour, "linestyle": "--", "linewidth": 2}
    if head == "new head":
        style = {"color": colour}
    axis.bar(7.6, 1.1, 1.9, middle - 0.55, **style)
    text_colour = "white" if head == "new head" else colour
    axis.text(7.6, middle, words[head], fontsize=13, color=text_colour, ha="center", va="center")
    axis.text(7.6, middle + 0.85, words[note], fontsize=14, color=colour, ha="center", va="center")
    point(axis, 8.6, 8.95, middle)
    axis.text(9.05, middle, words[answer], fontsize=13, va="center")


def point(axis, start, end, height):
    """Draw a small arrow from left to right."""
    arrow = {"width": 1, "headwidth": 7, "color": "black"}
    axis.annotate("", (end, height), (start, height), arrowprops=arrow)


def draw(words, directory):
    """Draw the picture with `words` into idea.png and idea.svg."""
    figure = plt.figure(figsize=(11.5, 6.6), layout="constrained")
    axis = figure.add_subplot()
    axis.set(xlim=(-0.1, 11), ylim=(-1.9, 5.8))
    axis.axis("off")
    draw_row(axis, 4, words, "before", "photos", "old head", OLD, "off", "old answer")
    draw_row(axis, 0, words, "after", "images", "new head", NEW, "on", "new answer")
    arrow = {"width": 5, "headwidth": 18, "color": BASE}
    axis.annotate("", (4.9, 1.2), (4.9, 2.8), arrowprops=arrow)
    axis.text(5.2, 2.0, words["kept"], fontsize=13, color=BASE, va="center")
    for left, right, colour, text in ((1.65, 6.25, BASE, "frozen"), (6.65, 8.55, NEW, "trained")):
        axis.plot([left, right], [-1.25, -1.25], color=colour, lw=4)
        centre = (left + right) / 2
        axis.text(centre, -1.55, words[text], fontsize=13, color=colour, ha="center", va="center")
    directory.mkdir(exist_ok=True)
    figure.savefig(directory / "idea.png", dpi=100)
    figure.savefig(directory / "idea.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    installed = font_manager.get_font_names()
    plt.rcParams["font.family"] = ["DejaVu Sans", *(font for font in FONTS if font in installed)]
    plt.rcParams["svg.hashsalt"] = "idea"  # the same file for the same picture
    draw(ENGLISH, DOCS)
    if not set(FONTS) & set(installed):
        sys.exit("docs/ja/idea.png was not drawn: install a Japanese font, such as fonts-noto-cjk")
    draw(JAPANESE, DOCS / "ja")
