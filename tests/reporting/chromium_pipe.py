"""Chromium driven over its DevTools pipe: two file descriptors and JSON, so no further package is needed."""

import base64
import fcntl
import json
import os
import select
import signal
import subprocess
import time


class Chromium:
    """One headless browser with one page; `events` has everything it reported."""

    def __init__(self, program, profile):
        down, up = os.pipe(), os.pipe()
        # The browser reads from descriptor 3 and writes to 4; ours move out of the way first.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (down[0], down[1], up[0], up[1])]
        for fd in (*down, *up):
            os.close(fd)
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [*command, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[3], 4)),
            start_new_session=True,
        )
        os.close(ends[0])
        os.close(ends[3])
        self.write, self.read = ends[1], ends[2]
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send one command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        wanted = self.number
        while True:
            answer = self._next(60)
            if answer.get("id") == wanted:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, seconds):
        deadline = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium says nothing")
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self.buffer += piece
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, url, width=1280, height=900, scheme="light", media=""):
        """Load a page at a width, in a colour scheme, and wait until its charts stand."""
        self.events.clear()
        self.size(width, height)
        self.media(scheme, media)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")
        self.until("[...document.querySelectorAll('[data-figure]')].every(e => e.querySelector('.main-svg'))")
        self.settle()

    def size(self, width, height=900):
        """Set the viewport, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, scheme, media=""):
        """Set what the style sheet is asked about."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def run(self, script):
        """Value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def until(self, script, seconds=30):
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > deadline:
                raise TimeoutError(script)
            time.sleep(0.05)

    def settle(self):
        """Wait for two frames and a breath: charts are redrawn on the next one."""
        self.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(r, 300))))")

    def press(self, key, code):
        """Press and release one key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, whole=False):
        """PNG bytes of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self):
        """PDF bytes, A4, backgrounds off as most people print."""
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])

    def complaints(self):
        """Console messages, exceptions, policy violations."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [e for e in self.events if e["method"] in names]

    def requests(self):
        """Every address that was asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def close(self):
        """End the browser and its children."""
        os.close(self.write)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.read)
