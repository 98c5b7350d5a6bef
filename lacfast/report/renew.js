// Takes in what is new without losing where the reader is.
(() => {
  const look = async () => (await fetch("stamp")).text();
  let seen = null;
  const renew = async () => {
    try {
      const now = await look();
      if (seen !== null && now !== seen) {
        const page = new DOMParser().parseFromString(await (await fetch(".")).text(), "text/html");
        const open = [...document.querySelectorAll("details")].map((each) => each.open);
        // The page that waits for a first iteration has fewer rules.
        for (const part of ["style", "main"]) document.querySelector(part).replaceWith(page.querySelector(part));
        document.querySelectorAll("details").forEach((each, index) => { each.open = open[index] ?? false; });
        document.title = page.title;
      }
      seen = now;
      document.documentElement.dataset.live = "yes";
    } catch {
      // The server has ended: what is shown stays.
      document.documentElement.dataset.live = "no";
    }
  };
  renew();
  setInterval(renew, 2000);
})();
