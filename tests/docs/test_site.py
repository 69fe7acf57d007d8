"""The site and the pages of maps in a real browser, as a reader has them: `make browser`.

Screenshots of every page are left in out/screens, to be looked at.
"""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlparse

import numpy as np
import pytest
import torch

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal, costs
from fullattn.plot import page as page_of
from helpers import ROOT

SCREENS = ROOT / "out" / "screens"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
WIDTHS = {"desk": 1280, "phone": 390}
# Other sites that pages link to; they are not visited.
ELSEWHERE = {"arxiv.org", "github.com", "semver.org", "squidfunk.github.io", "www.flickr.com"}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # a browser asks for many files at once


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(site))
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end of the test, whatever went wrong in the browser is an error."""
    contexts, wrong = [], []

    def open_page(url: str, width: str = "desk", scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        origin = urlparse(url)[:2]

        def requested(request: Any) -> None:
            if not request.url.startswith("data:") and urlparse(request.url)[:2] != origin:
                wrong.append(f"asks {request.url}")

        def failed(request: Any) -> None:
            if "ERR_ABORTED" not in request.failure:  # the reader went on to another page
                wrong.append(f"{request.failure} {request.url}")

        page.on("request", requested)
        page.on("console", lambda said: wrong.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", failed)
        page.goto(url, wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def _too_wide(page: Any) -> bool:
    """Whether the page as a whole scrolls sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))


def _pages(site: Path) -> list[str]:
    """Addresses of all pages, relative to the site."""
    found = [path.relative_to(site).parent.as_posix() for path in site.rglob("index.html")]
    return sorted(name.removeprefix(".") for name in found)


# Every page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_is_whole_and_fits(
    width: str, scheme: str, site: Path, address: str, opened: Callable[..., Any]
) -> None:
    names = _pages(site)
    assert len(names) > 25
    SCREENS.mkdir(parents=True, exist_ok=True)
    page = opened(address, width, scheme)
    for name in names:
        page.goto(f"{address}{name}/" if name else address, wait_until="load")
        assert not _too_wide(page), name
        for picture in page.locator("img").all():
            picture.scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every((picture) => picture.complete)")
        broken = page.evaluate(
            "[...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)"
        )
        assert broken == [], name
        shown = page.evaluate("document.body.dataset.mdColorScheme")
        assert shown == ("slate" if scheme == "dark" else "default")
        page.evaluate("window.scrollTo(0, 0)")
        file = f"{name.replace('/', '_') or 'home'}_{width}_{scheme}.png"
        page.screenshot(path=SCREENS / file, full_page=True)


def test_the_reader_can_turn_to_dark_and_the_figures_follow(
    address: str, opened: Callable[..., Any]
) -> None:
    page = opened(address)
    sheet = page.locator(".panels svg .sheet").first
    light = sheet.evaluate("(sheet) => getComputedStyle(sheet).fill")
    page.locator("label[for=__palette_1]").click()
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert sheet.evaluate("(sheet) => getComputedStyle(sheet).fill") != light


class _Links(HTMLParser):
    """The addresses that a page names, and the places in it that can be named."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value is not None and tag != "base":
                self.links.append(value)
            if name in ("id", "name") and value:
                self.places.add(value)


def test_every_link_leads_somewhere(site: Path) -> None:
    files = {path: _Links(path.read_text("utf-8")) for path in site.rglob("*.html")}
    base = "http://site/"
    for path, found in files.items():
        if path.name == "404.html":  # whose links start at the root of a server
            continue
        here = urljoin(base, path.relative_to(site).as_posix())
        for link in found.links:
            if link.startswith(("data:", "javascript:")):
                continue
            target = urlparse(urljoin(here, link))
            if target.netloc != "site":
                assert target.scheme == "https", f"{path.name}: {link}"
                assert target.netloc in ELSEWHERE, f"{path.name}: {link}"
                continue
            file = site / unquote(target.path).lstrip("/")
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{here}: {link}"
            if file in files:
                place = unquote(target.fragment)
                assert place in files[file].places or place.startswith("__"), f"{here}: {link}"


def test_the_search_finds_a_layer(address: str, opened: Callable[..., Any]) -> None:
    page = opened(address)
    # Key by key, as a reader types: the theme loses a text that arrives at once while its search
    # worker starts, also just after it says that it is ready.
    page.locator(".md-search-result__meta", has_text="Type to start").wait_for(state="attached")
    page.locator(".md-search__input").press_sequentially("FullyAttentional", delay=100)
    page.locator(".md-search-result__item").first.wait_for()


# The page of similarity maps


def _layers() -> tuple[dict[str, tuple[Any, Any]], torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 12, 16)
    layers = {
        "spatial": (SpatialNonLocal(6, scale=2.0).eval(), x),
        "channel": (ChannelNonLocal(6, scale=0.02), x),
        "fully": (FullyAttentional(6, scale=1.0).eval(), x),
    }
    photograph = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    return layers, photograph


@pytest.fixture
def maps(tmp_path: Path, opened: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    def open_maps(**options: Any) -> tuple[Any, Any]:
        layers, photograph = _layers()
        file = tmp_path / "maps.html"
        file.write_text(page_of(layers, photograph, point=(64, 48)), "utf-8")
        return opened(file.as_uri(), **options), layers

    return open_maps


def _click(page: Any, x: float, y: float) -> None:
    """Click on the photograph at a pixel of its 128 x 96."""
    box = page.locator("#photograph").bounding_box()
    page.mouse.click(
        box["x"] + (x + 0.5) / 128 * box["width"], box["y"] + (y + 0.5) / 96 * box["height"]
    )


def _pixels(page: Any, selector: str) -> str:
    return str(page.locator(selector).evaluate("(canvas) => canvas.toDataURL()"))


def _expected(layers: Any, column: int, row: int) -> dict[str, Any]:
    with torch.no_grad():
        spatial, fully = (
            layers[name][0].similarity(layers[name][1]) for name in ("spatial", "fully")
        )
    return {
        "spatial": spatial[0, row * 16 + column],
        "column": fully.columns[0, column],
        "row": fully.rows[0, row],
    }


def _hover(page: Any, kind: str, i: int, j: int) -> dict[str, str]:
    """Point at a number of a channel map; what the page then says of it."""
    canvas = page.locator(f"canvas[data-map={kind}]")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(
        box["x"] + (j + 0.5) / 6 * box["width"], box["y"] + (i + 0.5) / 6 * box["height"]
    )
    return dict(page.locator("#cell").evaluate("(cell) => ({...cell.dataset})"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_click_moves_the_point_and_all_maps_with_it(
    width: str, scheme: str, maps: Callable[..., tuple[Any, Any]]
) -> None:
    page, layers = maps(width=width, scheme=scheme)
    assert not _too_wide(page)
    seen = []
    for x, y in ((64, 48), (3, 90), (127, 0)):
        _click(page, x, y)
        assert page.locator("body").get_attribute("data-point") == f"{x},{y}"
        column, row = x * 16 // 128, y * 12 // 96
        assert f"column {column}, row {row} of the 16×12" in page.locator("#where").inner_text()
        expected = _expected(layers, column, row)
        over = page.locator("canvas.weights")
        assert int(over.get_attribute("data-position")) == int(expected["spatial"].argmax())
        value = float(over.get_attribute("data-value"))
        assert value == pytest.approx(float(expected["spatial"].max()), rel=1e-4)
        for kind in ("column", "row"):
            found = _hover(page, kind, 2, 4)
            assert (found["attends"], found["attended"]) == ("2", "4")
            assert float(found["value"]) == pytest.approx(float(expected[kind][2, 4]), rel=1e-4)
        page.locator("#photograph").scroll_into_view_if_needed()
        kinds = ("canvas.weights", "canvas[data-map=column]", "canvas[data-map=row]")
        seen.append([_pixels(page, selector) for selector in kinds])
        whole = _pixels(page, "canvas[data-map=image]")
        assert page.locator("canvas[data-map=image]").count() == 1
    for drawn in zip(*seen, strict=True):
        assert len(set(drawn)) == len(seen)
    _click(page, 20, 20)
    assert _pixels(page, "canvas[data-map=image]") == whole  # the channel layer has one for all
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / f"maps_{width}_{scheme}.png", full_page=True)


def test_the_colours_are_those_of_the_figures(maps: Callable[..., tuple[Any, Any]]) -> None:
    import matplotlib

    from fullattn.plot.figures import weight_norm

    page, layers = maps()
    weights = layers["channel"][0].similarity(layers["channel"][1])[0].detach()
    norm = weight_norm(weights)
    table = matplotlib.colormaps["viridis"](range(256), bytes=True)[:, :3].astype(int)
    drawn = page.locator("canvas[data-map=image]").evaluate(
        "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    found = np.array(drawn).reshape(6, 6, 4)[..., :3]
    expected = table[np.round(255 * np.asarray(norm(weights.numpy()))).astype(int)]
    assert np.abs(found - expected).max() <= 6  # a step of the table


def test_dragging_and_the_arrow_keys_move_the_point(maps: Callable[..., tuple[Any, Any]]) -> None:
    page, _ = maps()
    box = page.locator("#photograph").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    page.mouse.up()
    assert page.locator("body").get_attribute("data-point") == "127,95"
    page.locator("#photograph").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert page.locator("body").get_attribute("data-point") == "119,87"
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert page.locator("body").get_attribute("data-point") == "0,87"


def test_the_difference_is_that_of_the_channel_layers_map(
    maps: Callable[..., tuple[Any, Any]],
) -> None:
    page, layers = maps()
    _click(page, 40, 40)
    before = _pixels(page, "canvas[data-map=column]")
    page.locator("input[value=difference]").check()
    assert _pixels(page, "canvas[data-map=column]") != before
    layer, x = layers["fully"]
    single = ChannelNonLocal(6, scale=layer.scale).similarity(x)[0].detach()
    found = _hover(page, "only", 1, 2)
    assert float(found["value"]) == pytest.approx(float(single[1, 2]), rel=1e-4, abs=1e-12)
    expected = _expected(layers, 5, 5)["column"] - single
    found = _hover(page, "column", 3, 3)
    assert float(found["value"]) == pytest.approx(float(expected[3, 3]), rel=1e-3, abs=1e-6)
    page.locator("input[value=weights]").check()
    assert _pixels(page, "canvas[data-map=column]") == before


def test_the_two_channels_are_there_from_the_start_and_follow_the_point(
    maps: Callable[..., tuple[Any, Any]],
) -> None:
    page, layers = maps(width="phone")
    single = layers["channel"][0].similarity(layers["channel"][1])[0].detach()
    others = single.clone().fill_diagonal_(0)
    place = divmod(int(others.argmax()), 6)
    cell = page.locator("#cell").evaluate("(cell) => ({...cell.dataset})")
    assert (int(cell["attends"]), int(cell["attended"])) == place
    heights = [page.evaluate("document.documentElement.scrollHeight")]
    found = _hover(page, "column", 2, 4)
    page.locator("#photograph").scroll_into_view_if_needed()
    _click(page, 100, 20)
    heights.append(page.evaluate("document.documentElement.scrollHeight"))
    assert len(set(heights)) == 1  # nothing jumps under the pointer
    again = page.locator("#cell").evaluate("(cell) => ({...cell.dataset})")
    expected = _expected(layers, 100 * 16 // 128, 20 * 12 // 96)["column"][2, 4]
    assert again["value"] != found["value"]
    assert float(again["value"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_keyboard_reaches_the_numbers_of_a_map(maps: Callable[..., tuple[Any, Any]]) -> None:
    page, _ = maps()
    page.locator("canvas[data-map=row]").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    cell = page.locator("#cell").evaluate("(cell) => ({...cell.dataset})")
    assert (cell["attends"], cell["attended"]) == ("1", "1")
    assert page.locator("#channels").is_visible()


def test_the_page_in_the_site_is_that_of_the_photograph(
    address: str, opened: Callable[..., Any]
) -> None:
    page = opened(f"{address}see/")
    frame = page.frame_locator("iframe.maps")
    frame.locator("#photograph").scroll_into_view_if_needed()
    frame.locator("#photograph").click(position={"x": 20, "y": 20})
    assert re.match(r"Point \(\d+, \d+\) of 640×427", frame.locator("#where").inner_text())


# The cost explorer


def _value(page: Any, layer: str, figure: str) -> str:
    cell = page.locator(f"#explorer td[data-layer={layer}][data-figure={figure}]")
    return str(cell.get_attribute("data-value"))


def _slide(page: Any, name: str, value: int) -> None:
    """Move a slider as a hand does, with the events that this makes."""
    page.locator(f"#explore-{name}").evaluate(
        "(slider, value) => { slider.value = value;"
        " slider.dispatchEvent(new Event('input', { bubbles: true })); }",
        value,
    )


def _costs(shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    layers = {
        "fully": FullyAttentional(shape[1], project=False, device="meta"),
        "channel": ChannelNonLocal(shape[1], device="meta"),
        "spatial": SpatialNonLocal(shape[1], device="meta"),
    }
    return {name: costs.cost(layer, shape, **options) for name, layer in layers.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_sliders_move_every_figure(
    width: str, scheme: str, address: str, opened: Callable[..., Any]
) -> None:
    page = opened(f"{address}costs/", width, scheme)
    page.locator("#explore-backend").select_option("reference")  # the same on every machine
    shape = {"batch": 1, "channels": 512, "height": 97, "width": 97}
    before: dict[str, str] = {}
    for name, value in (("channels", 256), ("height", 40), ("width", 72), ("batch", 3)):
        _slide(page, name, value)
        shape[name] = value
        assert page.locator(f"#explore-{name}-number").input_value() == str(value)
        expected = _costs(tuple(shape.values()), backend="reference")
        for layer, cost in expected.items():
            for figure in ("flops", "map_bytes", "training_bytes", "inference_bytes"):
                found = _value(page, layer, figure)
                assert int(found) == getattr(cost, figure), (name, layer, figure)
                key = f"{layer} {figure}"
                if not (
                    layer == "channel" and figure == "map_bytes" and name in ("height", "width")
                ):
                    assert found != before.get(key), (name, key)
                before[key] = found
    # The bars are as long as their numbers say.
    bars = page.locator("#explorer .bars[data-figure=flops] .bar")
    lengths = [float(bar.evaluate("(bar) => parseFloat(bar.style.width)")) for bar in bars.all()]
    flops = [cost.flops for cost in expected.values()]
    assert lengths == pytest.approx([100 * n / max(flops) for n in flops], rel=1e-4)
    assert not _too_wide(page)
    shown = f"{expected['fully'].flops / 1e9:.2f}"
    assert page.locator("#explorer td[data-layer=fully][data-figure=flops]").inner_text() == shown
    summary = page.locator("#explore-summary").inner_text()
    assert summary.startswith(f"3×256×40×72, float32: forward FullyAttentional {shown}, Channel")


def test_dtype_device_backend_and_projection_move_the_figures(
    address: str, opened: Callable[..., Any]
) -> None:
    page = opened(f"{address}costs/")
    shape = (1, 512, 97, 97)
    page.locator("#explore-backend").select_option("sdpa")
    for dtype in ("bfloat16", "float32"):
        page.locator("#explore-dtype").select_option(dtype)
        for device, name in (("cuda", "GPU"), ("cpu", "CPU")):
            page.locator("#explore-device").select_option(label=name)
            assert page.locator("[data-control=threads]").is_visible() == (device == "cpu")
            threads = torch.get_num_threads()
            if device == "cpu":
                _slide(page, "threads", threads)
            options = {"dtype": getattr(torch, dtype), "device": device, "backend": "sdpa"}
            for layer, cost in _costs(shape, **options).items():
                assert _value(page, layer, "backend") == "sdpa"
                assert int(_value(page, layer, "training_bytes")) == cost.training_bytes
    bare = int(_value(page, "fully", "flops"))
    page.locator("#explore-project").check()
    assert int(_value(page, "fully", "flops")) - bare == 18 * 512**2 * 97**2
    page.locator("#explore-backend").select_option("triton")
    assert page.locator("#explorer td[data-figure=flops]").first.inner_text() == "–"
    said = page.locator("#explorer .reason[data-layer=fully]").inner_text()
    assert said == "FullyAttentional: triton runs on cuda, not on cpu."


def test_a_setting_can_be_sent_as_an_address(address: str, opened: Callable[..., Any]) -> None:
    page = opened(f"{address}costs/")
    page.get_by_role("button", name="4×128×64×64").click()
    page.locator("#explore-dtype").select_option("float16")
    sent = page.url
    figures = page.locator("#explore-result").inner_text()
    page.locator("a.headerlink").first.evaluate("(link) => link.click()")  # a place, no setting
    assert page.locator("#explore-result").inner_text() == figures
    again = opened(sent)
    assert again.locator("#explore-result").inner_text() == figures
    assert again.locator("#explore-channels-number").input_value() == "128"
    # Nonsense in an address leaves what the page starts with.
    nonsense = opened(f"{address}costs/#channels=-3&height=x&dtype=int8&backend=none&other=1")
    assert nonsense.locator("#explore-channels-number").input_value() == "512"
    assert nonsense.locator("#explore-dtype").input_value() == "float32"


@pytest.mark.parametrize("text", ["", "0", "-4", "1.5", "many", "2049", "1e3"])
def test_what_is_no_length_is_a_sentence_and_breaks_nothing(
    text: str, address: str, opened: Callable[..., Any]
) -> None:
    page = opened(f"{address}costs/")
    before = page.locator("#explore-result").inner_text()
    number = page.locator("#explore-channels-number")
    number.fill(text)
    said = page.locator("#explore-said").inner_text()
    assert said == f"C, channels: expected a whole number from 1 to 2,048, got “{text}”."
    assert number.get_attribute("aria-invalid") == "true"
    assert page.locator("#explore-result").inner_text() == before
    number.fill("64")
    assert page.locator("#explore-said").inner_text() == ""
    expected = _costs((1, 64, 97, 97))["channel"]
    assert int(_value(page, "channel", "flops")) == expected.flops
    assert number.get_attribute("aria-invalid") == "false"
