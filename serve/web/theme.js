// Runs before the page is drawn, so that a chosen theme does not flash; page.js has the button.
try {
  const theme = localStorage.getItem("invar-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is switched off: the system's theme it is
}
