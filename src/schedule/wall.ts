import type { CronFields } from './cron.ts';

// The clock on a wall: a calendar and a time of day that know nothing of zones. A wall time is in ms, as UTC would have it.
// A month's matching days are a set of bits, so a month without one costs a look and no walk through its days.

const DAY = 86_400_000;

/** The first matching wall time in [from, until), from a whole second on. */
export function nextWall(cron: CronFields, from: number, until: number): number | undefined {
  if (from >= until) return undefined;
  const day = Math.floor(from / DAY);
  const time = from - day * DAY;
  const month = monthOf(day);
  let days = cron.daysOf(month.month, month.weekday, month.length) & (-1 << (day - month.first));
  if (time > 0 && days & (1 << (day - month.first))) {
    const later = nextTime(cron, time);
    if (later !== undefined) return before(until, day * DAY + later);
    days &= ~(1 << (day - month.first));
  }
  while (days === 0) {
    nextMonth(month);
    if (month.first * DAY >= until) return undefined;
    days = cron.daysOf(month.month, month.weekday, month.length);
  }
  return before(until, (month.first + lowestBit(days)) * DAY + firstTime(cron));
}

/** How many wall times match in [from, until). */
export function countWalls(cron: CronFields, from: number, until: number): number {
  if (from >= until) return 0;
  const [firstDay, lastDay] = [Math.floor(from / DAY), Math.floor(until / DAY)];
  const whole = cron.hours.length * cron.minutes.length * cron.seconds.length;
  let count = 0;
  const month = monthOf(firstDay);
  for (; month.first <= lastDay; nextMonth(month)) {
    const days = cron.daysOf(month.month, month.weekday, month.length);
    for (let rest = days; rest !== 0; rest &= rest - 1) {
      const day = month.first + lowestBit(rest);
      if (day < firstDay || day > lastDay) continue;
      count += day < lastDay ? whole : timesBefore(cron, until - day * DAY);
      if (day === firstDay) count -= timesBefore(cron, from - day * DAY);
    }
  }
  return count;
}

interface Month {
  year: number;
  /** 1 to 12. */
  month: number;
  /** Its first day, counted from 1970-01-01. */
  first: number;
  /** What day of the week that is; 0 is Sunday. */
  weekday: number;
  length: number;
}

function monthOf(day: number): Month {
  const date = new Date(day * DAY);
  const [year, month, first] = [date.getUTCFullYear(), date.getUTCMonth() + 1, day - date.getUTCDate() + 1];
  // 1970-01-01 was a Thursday.
  return { year, month, first, weekday: (((first + 4) % 7) + 7) % 7, length: daysIn(year, month) };
}

function nextMonth(month: Month): void {
  month.first += month.length;
  month.weekday = (month.weekday + month.length) % 7;
  month.month = (month.month % 12) + 1;
  if (month.month === 1) month.year += 1;
  month.length = daysIn(month.year, month.month);
}

function daysIn(year: number, month: number): number {
  if (month === 2) return year % 4 === 0 && (year % 100 !== 0 || year % 400 === 0) ? 29 : 28;
  return month === 4 || month === 6 || month === 9 || month === 11 ? 30 : 31;
}

/** The first matching time of day at or after `from`, a whole second, in ms since midnight. */
function nextTime(cron: CronFields, from: number): number | undefined {
  const fromSecond = from / 1000;
  const [h, m, s] = [Math.floor(fromSecond / 3600), Math.floor(fromSecond / 60) % 60, fromSecond % 60];
  const [firstMinute = 0] = cron.minutes;
  const [firstSecond = 0] = cron.seconds;
  for (const hour of cron.hours) {
    if (hour < h) continue;
    if (hour > h) return ((hour * 60 + firstMinute) * 60 + firstSecond) * 1000;
    for (const minute of cron.minutes) {
      if (minute < m) continue;
      if (minute > m) return ((hour * 60 + minute) * 60 + firstSecond) * 1000;
      for (const second of cron.seconds) {
        if (second >= s) return ((hour * 60 + minute) * 60 + second) * 1000;
      }
    }
  }
  return undefined;
}

function firstTime({ hours: [hour = 0], minutes: [minute = 0], seconds: [second = 0] }: CronFields): number {
  return ((hour * 60 + minute) * 60 + second) * 1000;
}

/** How many matching times of day lie before `time`, in ms since midnight. */
function timesBefore({ hours, minutes, seconds }: CronFields, time: number): number {
  const toSecond = Math.ceil(time / 1000);
  const [h, m, s] = [Math.floor(toSecond / 3600), Math.floor(toSecond / 60) % 60, toSecond % 60];
  const below = (values: readonly number[], limit: number) => values.filter((value) => value < limit).length;
  let count = below(hours, h) * minutes.length * seconds.length;
  if (hours.includes(h)) {
    count += below(minutes, m) * seconds.length;
    if (minutes.includes(m)) count += below(seconds, s);
  }
  return count;
}

const before = (until: number, wall: number) => (wall < until ? wall : undefined);
const lowestBit = (bits: number) => 31 - Math.clz32(bits & -bits);
