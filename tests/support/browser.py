"""A headless Chromium on a page, and what it saw: errors of the console, refusals of the page's policy, requests."""
import json
import shutil
import time

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars", "--force-device-scale-factor=1"]
# Before anything of the page runs.
WATCH = """
window.seen = [];
addEventListener("securitypolicyviolation", (e) => seen.push(`policy: ${e.violatedDirective} ${e.blockedURI}`));
addEventListener("error", (e) => seen.push(`error: ${e.message}`));
addEventListener("unhandledrejection", (e) => seen.push(`rejection: ${e.reason}`));
"""


class Browser:
    def __init__(self, folder):
        program, driver = shutil.which("chromium"), shutil.which("chromedriver")
        assert program and driver, "chromium and chromium-driver are missing (scripts/test.sh installs them)"
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in [*FLAGS, f"--user-data-dir={folder}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        self.run = self.driver.execute_script

    def open(self, origin, width=1280, height=800):
        """A fresh page: nothing is kept of what the browser stored for this origin, or was told before."""
        self.origin = origin
        self.emulate()
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.size(width, height)
        self.driver.get(origin + "/")

    def size(self, width, height):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})

    def emulate(self, **features):
        """emulate(prefers_color_scheme="dark"); without any: as the system has them."""
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]})

    def find(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def wait(self, expression, what="", seconds=20):
        """Until a JavaScript expression holds; its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"return {expression}"):
                return value
            time.sleep(0.03)
        raise AssertionError(f"{what or expression}: not within {seconds} s; the page has\n{self.find('body').text[:2000]}")

    def problems(self, expected=()):
        """Errors since open(), but for answers with a status that the test wanted: parts of the console's lines."""
        console = [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
        return self.run("return seen") + [line for line in console if not any(part in line for part in expected)]

    def requests(self):
        """Addresses asked for since open()."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, path):
        self.driver.save_screenshot(str(path))

    def quit(self):
        self.driver.quit()
