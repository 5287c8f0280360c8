// Numbers for people.

const digits = (x) => (x >= 100 ? 0 : x >= 10 ? 1 : 2);
export const number = (x, places = 0) => x.toLocaleString("en", { maximumFractionDigits: places });
export const short = (x) => number(x, digits(Math.abs(x)));

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i + 1 < units.length) (n /= 1024), ++i;
  return `${short(n)} ${units[i]}`;
}

export const rate = (bytesPerSecond) => `${short(bytesPerSecond / 1e9)} GB/s`;
export const percent = (share) => `${number(100 * share, share < 0.1 ? 1 : 0)} %`;

export function milliseconds(ms) {
  return ms == null ? "–" : ms < 1000 ? `${short(ms)} ms` : seconds(ms / 1000);
}

export function seconds(s) {
  if (s < 1) return `${Math.round(1000 * s)} ms`;
  if (s < 120) return `${short(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${number(s / 3600, 1)} h` : `${number(s / 86400, 1)} days`;
}
