/**
 * Every code with which a socket is closed from here, its meaning, and whether the client should come back. Besides these,
 * the library closes with what RFC 6455, 7.4.1, says of a client that breaks the protocol (1002, 1007, 1008) or sends a
 * message that is too large (1009): such a client should be mended first.
 */
export const CLOSE = {
  /** The server stops or restarts. Come back, with last_event_id, elsewhere or in a moment. */
  goingAway: 1001,
  /** The credential has expired, or ten messages could not be understood. Come back with a good one, or mended. */
  policy: 1008,
  /** A fault of the server. Come back with last_event_id and a growing pause. */
  fault: 1011,
  /** The client reads more slowly than events come. Come back with last_event_id, and subscribe to less. */
  tooSlow: 1013,
  /** Nothing was heard for a minute. Come back with last_event_id. */
  silent: 4408,
} as const;
