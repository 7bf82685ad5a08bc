import { readdirSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const FOLDERS = ['/usr/lib', '/usr/lib64', '/usr/local/lib', '/opt/homebrew/lib'];
const LIBRARY = 'libfaketime.so.1';

/** Where libfaketime is: distributions put it below the folder of the architecture. */
function library(): string | undefined {
  for (const folder of FOLDERS) {
    for (const between of ['', ...entries(folder)]) {
      const place = join(folder, between, 'faketime');
      if (entries(place).includes(LIBRARY)) return join(place, LIBRARY);
    }
  }
  return undefined;
}

function entries(folder: string): string[] {
  try {
    return readdirSync(folder);
  } catch {
    return [];
  }
}

/**
 * Whether there is a libfaketime to lie about the time with (Debian's package is called so). Without it the tests that
 * need it are skipped, with a loud line; with REQUIRE_FAKETIME=1, as in CI, that is a failure.
 */
export function haveFaketime(): boolean {
  if (library()) return true;
  if (process.env['REQUIRE_FAKETIME'] === '1')
    throw new Error('REQUIRE_FAKETIME=1, and there is no libfaketime on this system.');
  console.warn('SKIPPED: the tests with wrong clocks, since there is no libfaketime on this system.');
  return false;
}

/** A clock that can be set while processes run. Timers go on as they were: only what the time is changes. */
export interface Clock {
  /** For the processes that are to have this clock. */
  env: Record<string, string>;
  /** How far it is from the right time, such as `+1h` or `-1d`; `+0` puts it right. */
  set(offset: string): void;
}

/** A clock kept in a file of `folder`, which every user may read. */
export function createClock(folder: string, name: string): Clock {
  const file = join(folder, name);
  const set = (offset: string) => {
    // Renamed, since the file is read at every look at the clock.
    writeFileSync(`${file}.new`, `${offset}\n`, { mode: 0o644 });
    renameSync(`${file}.new`, file);
  };
  set('+0');
  return {
    env: {
      LD_PRELOAD: library() ?? '',
      FAKETIME_TIMESTAMP_FILE: file,
      FAKETIME_NO_CACHE: '1',
      FAKETIME_DONT_FAKE_MONOTONIC: '1',
      FAKETIME_DISABLE_SHM: '1',
    },
    set,
  };
}
