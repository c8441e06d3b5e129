"""The page as a browser shows it: nothing overlaps or is cut off, words can be read, in light and dark."""

import json
import os
import re
import shutil
import subprocess
from itertools import product

import pytest
from left import leave
from PIL import Image
from tiers import tiered

from lightning_longnet.report import write_report

# What is wrong with the page, found by the browser itself
INSPECT = """
<script>
const faults = [], seen = {texts: 0, drawings: 0};
const box = each => each.getBoundingClientRect();
for (const drawing of document.querySelectorAll('svg')) {
  seen.drawings++;
  const name = drawing.getAttribute('aria-label'), frame = box(drawing);
  const texts = [...drawing.querySelectorAll('text')];
  if (!drawing.querySelector('path, circle, rect.fill')) faults.push(`${name}: nothing is drawn`);
  for (const [i, text] of texts.entries()) {
    seen.texts++;
    const a = box(text);
    if (a.height < 9) faults.push(`${name}: ${text.textContent} is ${a.height} high`);
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.bottom > frame.bottom + 1 || a.top < frame.top - 1)
      faults.push(`${name}: ${text.textContent} is cut off`);
    for (const other of texts.slice(i + 1)) {
      const b = box(other);
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
        faults.push(`${name}: ${text.textContent} is upon ${other.textContent}`);
    }
  }
  for (const line of drawing.querySelectorAll('.line')) {
    const a = box(line);
    if (a.right > frame.right + 1 || a.bottom > frame.bottom + 1) faults.push(`${name}: a line leaves the picture`);
  }
}
const blocks = [...document.querySelectorAll('figure, h1, h2, h3, .scroll, summary')];
for (const one of blocks) if (box(one).right > WIDTH) faults.push(`${one.textContent.slice(0, 40)} is cut off`);
for (const [i, one] of blocks.entries()) for (const other of blocks.slice(i + 1)) {
  const a = box(one), b = box(other);
  if (one.contains(other) || !a.width || !b.width) continue;
  if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
    faults.push(`${one.textContent.slice(0, 40)} is upon ${other.textContent.slice(0, 40)}`);
}
const style = getComputedStyle(document.body);
document.body.innerHTML = '<pre>' + JSON.stringify(
  {faults, seen, back: style.backgroundColor, ink: style.color, height: HEIGHT}) + '</pre>';
</script>
"""


def browser(profile, scheme, *arguments):
    result = shutil.which("chromium")
    assert result, "needs chromium: apt-get install chromium"
    command = [result, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run, four runs, and one of many ranks."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        leave(folder / f"learning-rate-{i}" / "version_0", slope=i + 0.5, ranks=2 * (i + 1), rate=2**i)
        for i in range(4)
    ]
    many = leave(folder / "many", ranks=64, placement="zigzag")
    return {
        "one": write_report(runs[:1], folder / "one.html", images=False),
        "four": write_report(runs, folder / "four.html", images=False),
        "many": write_report([many], folder / "many.html", images=False),
    }


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


LOOKS = list(product(["one", "four", "many"], ["light", "dark"], [1280, 420]))


@pytest.mark.parametrize(("name", "scheme", "width"), tiered(LOOKS, quick=[], full=LOOKS[:-1]))
def test_a_page_can_be_read(pages, tmp_path, name, scheme, width):
    page = pages[name].read_text()
    assert "</body>" in page
    # a browser's window is never as narrow as a telephone; a page's body can be
    narrow = f"<style>html {{ width: {width}px; }}</style>"
    height = 6000 if width < 1000 else 3000
    inspected, plain = tmp_path / "inspected.html", tmp_path / "plain.html"
    script = INSPECT.replace("WIDTH", str(width)).replace("HEIGHT", "document.documentElement.scrollHeight")
    plain.write_text(page.replace("</head>", narrow + "</head>"))
    inspected.write_text(page.replace("</head>", narrow + "</head>").replace("</body>", script + "</body>"))
    size = f"--window-size=1280,{height}"
    shown = browser(tmp_path / "profile", scheme, size, "--dump-dom", inspected.as_uri())
    result = json.loads(re.search(r"<pre>(.*?)</pre>", shown, re.DOTALL)[1].replace("&gt;", ">").replace("&lt;", "<"))
    assert result["faults"] == []
    assert result["seen"]["drawings"] >= 15
    assert result["seen"]["texts"] >= 150
    back, ink = brightness(result["back"]), brightness(result["ink"])
    assert (back > 200 > 60 > ink) if scheme == "light" else (back < 60 < 200 < ink)

    picture = tmp_path / "picture.png"
    browser(tmp_path / "profile", scheme, size, f"--screenshot={picture}", plain.as_uri())
    with Image.open(picture) as image:
        image = image.convert("RGB").crop((0, 0, width, height))
        assert len(image.getcolors(2**24)) > 50
        corner = image.getpixel((3, 3))
        assert abs(sum(corner) / 3 - back) < 3
        if keep := os.environ.get("KEEP_PICTURES"):  # for a person to look at
            image.save(f"{keep}/{name}-{scheme}-{width}.png")
