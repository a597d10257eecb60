// Asks flash channels for codewords from a list, as many at a time as it is told, and adds up what comes.
//
// A change of `go` reads requests.bin in the working directory: entries of 64 bits, big-endian: channel (8), page (24),
// first codeword (16), room (8), codewords (8).  Entries wait in a queue of their channel from the moment that
// `in_flight` leaves room for as many codewords more, which may be those of further entries that come together with this
// one; each is asked for codeword by codeword, as a lane asks.  `done` rises when all
// have come; `sum` is the sum of all data words (order does not matter), `cycles` the time from the first request to the
// last beat.  Between the moment when as many have come as may be in flight, and the moment when the list's last entry
// is put into its queue, the load is steady: `steady_cycles` and `steady_codewords` are of that time.

module request_source #(
    parameter CHANNELS = 8,
    parameter LIST = 65536,
    parameter REQUEST_BITS = 64,
    parameter PLACE_AT = 0,
    parameter PLACE_BITS = 9,
    parameter PAGE_AT = 16,
    parameter PAGE_BITS = 24,
    parameter INDEX_AT = 40,
    parameter INDEX_BITS = 5,
    parameter BEAT_BITS = 82,
    parameter DATA_AT = 16,
    parameter WORD_BITS = 64,
    parameter LAST_AT = 80,
    parameter ERROR_AT = 81
) (
    input clk,
    input rst,
    output reg [CHANNELS-1:0] request_valid,
    input [CHANNELS-1:0] request_ready,
    output reg [CHANNELS*REQUEST_BITS-1:0] request_payload,
    input [CHANNELS-1:0] codeword_valid,
    input [CHANNELS*BEAT_BITS-1:0] codeword_payload,

    input go,
    input [31:0] in_flight,
    output reg done,
    output reg [63:0] cycles,
    output reg [63:0] sum,
    output reg [31:0] codewords,
    output reg [31:0] errors,
    output reg [63:0] steady_cycles,
    output reg [31:0] steady_codewords
);

  reg [63:0] list [0:LIST-1];
  reg [63:0] queue [0:CHANNELS*LIST-1];
  integer head [0:CHANNELS-1];
  integer tail [0:CHANNELS-1];
  reg [15:0] part [0:CHANNELS-1];     // codewords of the head entry that were asked for
  reg [PLACE_BITS-1:0] place [0:CHANNELS-1];
  integer c, i, next, count, outstanding, file, got;
  reg going, steady;
  reg [63:0] from_cycles;
  reg [31:0] from_codewords;
  reg [63:0] entry;
  reg [REQUEST_BITS-1:0] request;
  reg [WORD_BITS-1:0] word;

  initial begin
    going = 0;
    steady = 0;
    from_cycles = 0;
    from_codewords = 0;
    steady_cycles = 0;
    steady_codewords = 0;
    next = 0;
    count = 0;
    outstanding = 0;
    done = 0;
    cycles = 0;
    sum = 0;
    codewords = 0;
    errors = 0;
    request_valid = 0;
    request_payload = 0;
    for (c = 0; c < CHANNELS; c = c + 1) begin
      head[c] = 0;
      tail[c] = 0;
      part[c] = 0;
      place[c] = 0;
    end
  end

  always @(posedge clk) begin
    if (go != going) begin
      going = go;
      next = 0;
      count = 0;
      cycles = 0;
      sum = 0;
      codewords = 0;
      errors = 0;
      steady = 0;
      steady_cycles = 0;
      steady_codewords = 0;
      done <= 0;
      file = $fopen("requests.bin", "rb");
      if (file != 0) begin
        got = $fread(list, file);
        count = got / 8;
        $fclose(file);
      end
    end else if (count != 0 && !done) begin
      cycles = cycles + 1;
      // Received.
      for (c = 0; c < CHANNELS; c = c + 1) if (codeword_valid[c]) begin
        word = codeword_payload[c * BEAT_BITS + DATA_AT +: WORD_BITS];
        for (i = 0; i < WORD_BITS; i = i + 64) sum = sum + word[i +: 64];
        if (codeword_payload[c * BEAT_BITS + LAST_AT]) begin
          codewords = codewords + 1;
          outstanding = outstanding - 1;
          errors = errors + codeword_payload[c * BEAT_BITS + ERROR_AT];
        end
      end
      // Asked for.
      for (c = 0; c < CHANNELS; c = c + 1) if (request_valid[c] && request_ready[c]) begin
        part[c] = part[c] + 1;
        place[c] = place[c] + 1;
        entry = queue[c * LIST + head[c] % LIST];
        if (part[c] == entry[7:0]) begin
          part[c] = 0;
          head[c] = head[c] + 1;
        end
      end
      // Put into the queues.
      if (!steady && codewords >= in_flight) begin
        steady = 1;
        from_cycles = cycles;
        from_codewords = codewords;
      end
      if (steady && next != count) begin
        steady_cycles = cycles - from_cycles;
        steady_codewords = codewords - from_codewords;
      end
      if (next != count) begin
        entry = list[next];
        if (outstanding + entry[15:8] <= in_flight) begin
          c = entry[63:56];
          queue[c * LIST + tail[c] % LIST] = entry;
          tail[c] = tail[c] + 1;
          outstanding = outstanding + entry[7:0];
          next = next + 1;
        end
      end
      for (c = 0; c < CHANNELS; c = c + 1) begin
        request_valid[c] <= head[c] != tail[c];
        entry = queue[c * LIST + head[c] % LIST];
        request = 0;
        request[PLACE_AT +: PLACE_BITS] = place[c];
        request[PAGE_AT +: PAGE_BITS] = entry[32 +: PAGE_BITS];
        request[INDEX_AT +: INDEX_BITS] = entry[16 +: 16] + part[c];
        request_payload[c * REQUEST_BITS +: REQUEST_BITS] <= request;
      end
      if (next == count && outstanding == 0) done <= 1;
    end
    if (rst) request_valid <= 0;
  end

endmodule
