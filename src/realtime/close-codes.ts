/** Every code with which a socket is closed from here, its meaning, and whether the client should come back. */
export const CLOSE = {
  /** The server stops or restarts. Come back, with last_event_id, elsewhere or in a moment. */
  goingAway: 1001,
  /** The credential has expired or was revoked, or the client does not keep to the protocol. Come back with a good one. */
  policy: 1008,
  /** A fault of the server. Come back with a growing pause. */
  fault: 1011,
  /** The client reads more slowly than events come. Come back with last_event_id, and subscribe to less. */
  tooSlow: 1013,
  /** Nothing was heard for a minute. Come back. (Frames that are too large are closed with 1009 by the protocol itself.) */
  silent: 4408,
} as const;
