// Sound as it comes: base64 of 16-bit samples, one channel, 24 kHz.

const RATE = 24000;

export class Player {
  constructor() {
    this.context = new AudioContext({ sampleRate: RATE });
    this.pieces = [];
    this.at = 0; // when what has come is played to its end
    this.length = 0;
    this.over = false;
  }

  add(data) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const samples = new Int16Array(bytes.buffer);
    this.pieces.push(samples);
    this.length += samples.length;
    if (this.over || !samples.length) return;
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.getChannelData(0).set(Float32Array.from(samples, (value) => value / 32768));
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    // A little late to begin with, so that the next piece is here before it is needed.
    this.at = Math.max(this.at, this.context.currentTime + 0.08);
    source.start(this.at);
    this.at += buffer.duration;
  }

  samples() {
    const all = new Int16Array(this.length);
    let at = 0;
    for (const piece of this.pieces) {
      all.set(piece, at);
      at += piece.length;
    }
    return all;
  }

  stop() {
    this.over = true;
    this.context.close();
  }
}

export function wav(samples) {
  const head = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((letter, i) => head.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  head.setUint32(4, 36 + samples.byteLength, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true);
  head.setUint16(22, 1, true);
  head.setUint32(24, RATE, true);
  head.setUint32(28, 2 * RATE, true);
  head.setUint16(32, 2, true);
  head.setUint16(34, 16, true);
  text(36, "data");
  head.setUint32(40, samples.byteLength, true);
  return new Blob([head, samples], { type: "audio/wav" });
}
