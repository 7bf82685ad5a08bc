import { beforeEach, expect, test, vi } from 'vitest';
import { hashPassword, MAX_WAITING, PARALLEL, passwordFault, verifyPassword } from '../../src/auth/passwords.ts';

/** Stands in for scrypt: a hash is done when the test says so, and never before. */
const scrypts = vi.hoisted(() => ({ pending: [] as (() => void)[], most: 0 }));
vi.mock('node:crypto', async (original) => {
  const crypto = await original<typeof import('node:crypto')>();
  const scrypt = (...args: Parameters<typeof crypto.scrypt>) => {
    const [, , length, , done] = args;
    scrypts.pending.push(() => done(null, Buffer.alloc(length)));
    scrypts.most = Math.max(scrypts.most, scrypts.pending.length);
  };
  return { ...crypto, default: crypto, scrypt };
});

beforeEach(() => {
  scrypts.most = 0;
});

/** Finishes every hash, also those that begin because another is done. */
async function finishAll(): Promise<void> {
  const turn = () => new Promise(setImmediate);
  for (await turn(); scrypts.pending.length > 0; await turn()) scrypts.pending.shift()?.();
}

test('no more hashes are computed at once than the machine bears, however many come and whenever', async () => {
  const hashes = Array.from({ length: 20 }, () => hashPassword('correct horse battery'));
  // Those that come in the very moment between a slot's being free and its being taken by who waited.
  scrypts.pending.shift()?.();
  const late = Promise.resolve().then(() => Promise.all([hashPassword('late'), verifyPassword('late', null)]));
  await finishAll();
  await Promise.all([...hashes, late]);
  expect(scrypts.most).toBe(PARALLEL);
  // And all slots are free again.
  const again = Array.from({ length: PARALLEL }, () => hashPassword('again'));
  expect(scrypts.pending).toHaveLength(PARALLEL);
  await finishAll();
  await Promise.all(again);
});

test('whoever would wait too long is told to come later (503), and those who wait are served', async () => {
  const served = Array.from({ length: PARALLEL + MAX_WAITING }, () => verifyPassword('a password', null));
  await expect(verifyPassword('one more', null)).rejects.toMatchObject({
    status: 503,
    headers: { 'retry-after': '5' },
  });
  await finishAll();
  expect(await Promise.all(served)).toEqual(served.map(() => false));
  const after = verifyPassword('one more', null);
  await finishAll();
  expect(await after).toBe(false);
});

test.each([
  ['password1', 'in small letters'],
  ['PassWord1', 'in any letters'],
  ['ｐａｓｓｗｏｒｄ１', 'in wide letters, which are hashed as the plain ones'],
  ['Ada.Lovelace', 'the name in the address'],
  ['ada.lovelace@example.com', 'the address'],
  ['ABABABAB', 'two characters'],
])('%s is refused (%s)', (password) => {
  expect(passwordFault(password, 'ada.lovelace@example.com')).toBeDefined();
});

test('any other is taken, whatever it is made of', () => {
  for (const password of ['correct horse battery', 'пароль и ещё слово', '🐎🔋📎🐎🔋📎🐎', '84629157'])
    expect(passwordFault(password, 'ada.lovelace@example.com')).toBeUndefined();
});
