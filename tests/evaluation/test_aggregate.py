"""Every overall number that the papers print, from its parts, as they print them; the rows that do not agree are known.

Tables: IOMM (arXiv 2603.16139) 1, 2, 3, 8, 9; Cheers 3; SynerGen-VL (arXiv 2412.09604) 2, 4.
"""

from statistics import mean

import pytest

from diptych.evaluation.benchmarks import aggregate

# single, two, counting, colors, position, color_attr: overall; printed with two digits
GENEVAL = """
iomm/SDv1.5 .97 .38 .35 .76 .04 .06 .43
iomm/SDv2.1 .98 .51 .44 .85 .07 .17 .50
iomm/SD3-Medium .99 .94 .72 .89 .33 .60 .74
iomm/SDXL .98 .74 .39 .85 .15 .23 .55
iomm/PixArt .98 .50 .44 .80 .08 .07 .48
iomm/DALL-E-2 .94 .66 .49 .77 .10 .19 .52
iomm/DALL-E-3 .96 .87 .47 .83 .43 .45 .67
iomm/Lumos-T2I .99 .64 .52 .84 .15 .30 .57
iomm/Show-o .98 .80 .66 .84 .31 .50 .68
iomm/Show-o2-7B 1.00 .87 .58 .92 .52 .62 .76
iomm/Janus .97 .68 .30 .84 .46 .42 .61
iomm/JanusFlow .97 .59 .45 .83 .53 .42 .63
iomm/Janus-Pro-1B .98 .82 .51 .89 .65 .56 .73
iomm/Janus-Pro-7B .99 .89 .59 .90 .79 .66 .80
iomm/BAGEL-7B .98 .95 .84 .95 .78 .77 .88
iomm/IOMM-B-512 .99 .92 .83 .94 .91 .75 .89
iomm/IOMM-B-1024 .99 .91 .75 .93 .88 .75 .87
iomm/IOMM-L-512 .99 .91 .82 .94 .85 .72 .87
iomm/IOMM-L-1024 1.00 .91 .71 .92 .78 .78 .85
iomm9/pair-image 1.00 .95 .63 .87 .50 .72 .78
iomm9/pair-pair .99 .92 .76 .91 .87 .69 .86
iomm9/pair-mix .99 .91 .80 .92 .90 .75 .88
iomm9/image-image .99 .84 .24 .75 .37 .45 .61
iomm9/image-pair .99 .91 .77 .93 .87 .75 .87
iomm9/image-mix .99 .92 .83 .94 .91 .75 .89
iomm2/OpenUni-L .99 .91 .77 .90 .75 .76 .85
iomm2/OpenUni-L+image 1.00 .98 .22 .91 .60 .77 .74
iomm2/OpenUni-L+pair .99 .94 .82 .91 .85 .76 .88
iomm2/OpenUni-L+mix .99 .91 .78 .93 .87 .78 .88
iomm2/Qwen-Image-512 .99 .91 .87 .88 .73 .74 .85
iomm2/Qwen-Image-512+image .55 .51 .38 .43 .30 .37 .42
iomm2/Qwen-Image-512+pair 1.00 .93 .88 .91 .82 .75 .88
iomm2/Qwen-Image-512+mix 1.00 .92 .87 .91 .82 .79 .89
iomm2/Qwen-Image-1024 .99 .93 .88 .90 .77 .74 .87
iomm2/Qwen-Image-1024+image .54 .61 .47 .47 .28 .47 .47
iomm2/Qwen-Image-1024+pair 1.00 .93 .88 .91 .82 .75 .88
iomm2/Qwen-Image-1024+mix .99 .92 .90 .91 .81 .80 .89
cheers/LlamaGen .71 .34 .21 .58 .07 .04 .32
cheers/SDXL .98 .74 .39 .85 .15 .23 .55
cheers/DALL-E-3 .96 .87 .47 .83 .43 .45 .67
cheers/SD3-Medium .99 .94 .72 .89 .33 .60 .74
cheers/Show-o .95 .52 .49 .82 .11 .28 .53
cheers/TokenFlow-XL .95 .60 .41 .81 .16 .24 .55
cheers/Janus .97 .68 .30 .84 .46 .42 .61
cheers/D-DiT .97 .80 .54 .76 .32 .50 .65
cheers/Emu3 .99 .81 .42 .80 .49 .45 .66
cheers/Janus-Pro .98 .82 .51 .89 .65 .56 .73
cheers/Show-o2 .99 .86 .55 .86 .46 .63 .73
cheers/Harmon .99 .86 .66 .85 .74 .48 .76
cheers/Tar .99 .91 .76 .81 .57 .51 .76
cheers/Cheers .98 .92 .65 .86 .63 .65 .78
synergen/LlamaGen .71 .34 .21 .58 .07 .04 .32
synergen/LDM .92 .29 .23 .70 .02 .05 .37
synergen/SDv1.5 .97 .38 .35 .76 .04 .06 .43
synergen/SDXL .98 .74 .39 .85 .15 .23 .55
synergen/PixArt .98 .50 .44 .80 .08 .07 .48
synergen/DALL-E-2 .94 .66 .49 .77 .10 .19 .52
synergen/SEED-X .97 .58 .26 .80 .19 .14 .49
synergen/Show-o .95 .52 .49 .82 .11 .28 .53
synergen/LWM .93 .41 .46 .79 .09 .15 .47
synergen/Emu3-Gen .98 .71 .34 .81 .17 .21 .54
synergen/Janus .97 .68 .30 .84 .46 .42 .61
"""
# cultural, time, space, biology, physics, chemistry: overall
WISE = """
iomm8/B512 .50 .56 .66 .49 .72 .46 .55
iomm8/B1024 .44 .50 .64 .46 .63 .43 .50
iomm8/L512 .48 .56 .63 .49 .64 .51 .53
iomm8/L1024 .44 .48 .59 .43 .58 .44 .48
iomm8/BAGEL .44 .55 .68 .44 .60 .39 .52
iomm8/MetaQuery-XL .56 .55 .62 .49 .63 .41 .55
iomm8/FLUX.1-dev .48 .58 .62 .42 .51 .35 .50
"""
# add, adjust, extract, replace, remove, background, style, compose (hybrid), action: overall
IMGEDIT = """
iomm3/MagicBrush 2.84 1.58 1.51 1.97 1.58 1.75 2.38 1.62 1.22 1.90
iomm3/Instruct-Pix2Pix 2.45 1.83 1.44 2.01 1.50 1.44 3.55 1.20 1.46 1.88
iomm3/AnyEdit 3.18 2.95 1.88 2.47 2.23 2.24 2.85 1.56 2.65 2.45
iomm3/UltraEdit 3.44 2.81 2.13 2.96 1.45 2.83 3.76 1.91 2.98 2.70
iomm3/OmniGen 3.47 3.04 1.71 2.94 2.43 3.21 4.19 2.24 3.38 2.96
iomm3/ICEdit 3.58 3.39 1.73 3.15 2.93 3.08 3.84 2.04 3.68 3.05
iomm3/Step1X-Edit 3.88 3.14 1.76 3.40 2.41 3.16 4.63 2.64 2.52 3.06
iomm3/BAGEL 3.56 3.31 1.70 3.30 2.62 3.24 4.49 2.38 4.17 3.20
iomm3/pair-pre-trained 3.18 2.17 1.92 2.70 1.17 3.36 4.39 1.49 3.14 2.61
iomm3/image-only-pre-trained 3.84 2.37 2.12 2.60 1.30 3.14 4.41 1.80 3.78 2.82
"""
KNOWN = {"cheers/TokenFlow-XL": 0.528, "iomm8/BAGEL": 0.501, "iomm3/MagicBrush": 1.828}


def rows(text, names):
    for line in text.strip().splitlines():
        name, *numbers = line.split()
        *parts, printed = map(float, numbers)
        yield name, dict(zip(names, parts, strict=True)), printed


def disagreeing(text, names, overall):
    """The rows whose recomputed overall is further from the printed one than rounding its parts explains (0.01)."""
    found = {}
    for name, parts, printed in rows(text, names):
        if abs(overall(parts) - printed) > 0.0101:
            found[name] = round(overall(parts), 3)
    return found


WISE_NAMES = ("culture", "time", "space", "biology", "physics", "chemistry")
TABLES = (
    (GENEVAL, aggregate.GENEVAL, aggregate.geneval),
    (WISE, WISE_NAMES, aggregate.wise),
    (IMGEDIT, aggregate.IMGEDIT, aggregate.imgedit),
)


def test_printed_overall_columns():
    """All but three of 79 rows."""
    assert sum(len(list(rows(text, names))) for text, names, _ in TABLES) == 79
    assert {k: v for table in TABLES for k, v in disagreeing(*table).items()} == KNOWN


def test_a_wrong_formula_would_not_agree():
    """With other weights, or without a part, most rows disagree: the proof can fail."""
    image_mean = {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert (
        len(disagreeing(GENEVAL, aggregate.GENEVAL, lambda p: sum(image_mean[k] * v for k, v in p.items()) / 553)) > 8
    )
    assert len(disagreeing(WISE, WISE_NAMES, lambda p: mean(p.values()))) > 3
    assert len(disagreeing(IMGEDIT, aggregate.IMGEDIT, lambda p: mean(list(p.values())[:8]))) > 5


def test_printed_gains_of_tags():
    """The mean of gains is the gain of the mean: SGT's figure of GenEval by tag, over both bases."""
    for *gains, printed in ((4.7, 3.1, 5.8, 4.6, -0.3, 1.2, 3.2), (6.0, -2.1, 6.0, 5.0, -1.2, 0.0, 2.3)):
        assert aggregate.geneval(dict(zip(aggregate.GENEVAL, gains, strict=True))) == pytest.approx(printed, abs=0.1)


def test_mme_and_cv_bench():
    """No paper prints their parts; of MME SynerGen-VL prints the sum and perception, which leaves 456."""
    perception, cognition = aggregate.mme(
        {**dict.fromkeys(aggregate.PERCEPTION, 138.1), **dict.fromkeys(aggregate.COGNITION, 114)}
    )
    assert (round(perception), round(cognition)) == (1381, 456) and round(perception + cognition) == 1837  # SynerGen-VL
    assert len(aggregate.PERCEPTION) == 10 and len(aggregate.COGNITION) == 4
    assert aggregate.cv_bench(0.6, 0.8, 0.9) == pytest.approx(0.8)
    assert sum(aggregate.WISE.values()) == pytest.approx(1) == sum(aggregate.VERIFIED.values())
    assert aggregate.wiscore(2, 2, 2) == 1 and aggregate.wiscore(2, 0, 0) == 0.7
    assert len(aggregate.IMGEDIT) == 9 and len(aggregate.GEDIT) == 11
