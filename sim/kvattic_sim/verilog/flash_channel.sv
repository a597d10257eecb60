// Behavioural twin of one flash channel: its NAND pages, controller and ECC, as the engine sees them.
//
// Requests for codewords wait in a queue, each until its latency is over, and a V codeword (kind 1) also until its
// slot's value_open is set or the slot is in another epoch.  Of those that may go, the oldest goes, or a random one (shuffle).  Its beats follow each
// other, and the next codeword's, without a bubble unless stalls are asked for.  Padding beats are stored but not sent.
//
// Settings are sampled in each cycle; a change of `configure` seeds the random numbers, and counts codewords from 1
// again for the fault.  A change of `load` reads the file flash<CHANNEL>.bin in the working directory, which is a
// sequence of records: 32 bits first word, 32 bits number of words (both big-endian), then the words, first byte most
// significant.
//
// Everything is clocked, internal state is assigned blocking in one process: Verilator and Icarus 11 agree on it.

module flash_channel #(
    parameter CHANNEL = 0,
    // Fields of a request: the tag and, inside of it, slot, kind and epoch; page; codeword inside of the page.
    parameter REQUEST_BITS = 64,
    parameter TAG_AT = 0,
    parameter TAG_BITS = 16,
    parameter SLOT_AT = 0,        // counted from TAG_AT
    parameter SLOT_BITS = 2,
    parameter KIND_AT = 2,        // counted from TAG_AT
    parameter EPOCH_AT = 12,      // counted from TAG_AT
    parameter EPOCH_BITS = 4,
    parameter PAGE_AT = 16,
    parameter PAGE_BITS = 32,
    parameter INDEX_AT = 48,
    parameter INDEX_BITS = 5,
    // Fields of a beat that is sent.
    parameter BEAT_BITS = 81,
    parameter BEAT_TAG_AT = 0,
    parameter BEAT_DATA_AT = 16,
    parameter BEAT_LAST_AT = 80,
    parameter WORD_BITS = 64,
    // Geometry.
    parameter BEATS = 64,         // words of a codeword that are sent
    parameter WORDS = 64,         // words of a codeword that are stored
    parameter CODEWORDS = 32,     // codewords of a page
    parameter PAGES = 16,
    parameter QUEUE = 64,
    parameter SLOTS = 4
) (
    input clk,
    input rst,

    input request_valid,
    output reg request_ready,
    input [REQUEST_BITS-1:0] request_payload,
    output reg codeword_valid,
    input codeword_ready,
    output reg [BEAT_BITS-1:0] codeword_payload,
    input [SLOTS-1:0] value_open,
    input [SLOTS*EPOCH_BITS-1:0] epoch,

    input [31:0] latency,          // cycles from a request's acceptance until its codeword may go
    input [31:0] jitter,           // up to so many random cycles more
    input shuffle,
    input [8:0] gap,               // probability, of 256, that no beat is offered in a cycle
    input [3:0] gap_pattern,       // cycles of four in which no beat is offered
    input [8:0] request_stall,     // the same two for request_ready
    input [3:0] request_stall_pattern,
    input [31:0] seed,
    input [2:0] fault,
    input [31:0] fault_number,     // which codeword, the first after `configure` is 1
    input [31:0] fault_value,      // corrupt: bits of the tag to flip; duplicate, delay: cycles
    input configure,
    input load,

    output reg [31:0] served,      // codewords begun since `configure`
    output reg [31:0] load_errors
);

  localparam [2:0] DROP = 1, DUPLICATE = 2, CORRUPT = 3, DELAY = 4;
  localparam DEPTH = PAGES * CODEWORDS * WORDS;

  reg [WORD_BITS-1:0] mem [0:DEPTH-1];

  // The queue: a place is a request's as long as its bit of `used` is set.
  reg [QUEUE-1:0] used;
  reg [REQUEST_BITS-1:0] waiting [0:QUEUE-1];
  reg [31:0] due [0:QUEUE-1];
  reg [31:0] order [0:QUEUE-1];
  reg [31:0] next_order;
  integer count;

  reg [31:0] now;
  reg [31:0] random;
  reg configured, loaded;

  // The codeword that is being sent.
  integer left;
  reg [63:0] address;
  reg [TAG_BITS-1:0] tag;

  integer i, place, slot;
  reg found, allowed;
  reg [2:0] wrong;
  reg [31:0] key, best;
  reg [TAG_BITS-1:0] wanted;

  integer file, got;
  reg [63:0] header;
  reg [8*24-1:0] name;

  function [31:0] step(input [31:0] x);  // xorshift
    begin
      step = x ^ (x << 13);
      step = step ^ (step >> 17);
      step = step ^ (step << 5);
    end
  endfunction

  initial begin
    for (i = 0; i < DEPTH; i = i + 1) mem[i] = {WORD_BITS{1'b1}};  // erased
    configured = 0;
    loaded = 0;
    used = 0;
    count = 0;
    left = 0;
    now = 0;
    random = 1;
    next_order = 0;
    address = 0;
    tag = 0;
    request_ready = 0;
    codeword_valid = 0;
    codeword_payload = 0;
    served = 0;
    load_errors = 0;
  end

  always @(posedge clk) begin
    now = now + 1;
    random = step(random);
    if (configure != configured) begin
      configured = configure;
      random = step(seed ^ ((CHANNEL + 1) * 32'h9E3779B1));
      if (random == 0) random = 1;
      served <= 0;
    end

    // ------------------------------------------------------------ contents
    if (load != loaded) begin
      loaded = load;
      $sformat(name, "flash%0d.bin", CHANNEL);
      file = $fopen(name, "rb");
      if (file != 0) begin
        got = $fread(header, file);
        while (got == 8) begin
          if (header[63:32] + header[31:0] > DEPTH) got = 0;
          else got = $fread(mem, file, header[63:32], header[31:0]);
          if (got != header[31:0] * (WORD_BITS / 8)) begin
            load_errors <= load_errors + 1;
            got = 0;
          end else got = $fread(header, file);
        end
        $fclose(file);
      end
    end

    // ------------------------------------------------------------ codewords
    if (codeword_ready || !codeword_valid) begin
      codeword_valid <= 0;
      if (left == 0 && count != 0) begin
        found = 0;
        place = 0;
        best = 0;
        for (i = 0; i < QUEUE; i = i + 1) begin
          if (used[i] && !((now - due[i]) >> 31)) begin
            wanted = waiting[i][TAG_AT +: TAG_BITS];
            slot = wanted[SLOT_AT +: SLOT_BITS];
            allowed = !wanted[KIND_AT] || value_open[slot]
                || wanted[EPOCH_AT +: EPOCH_BITS] != epoch[slot * EPOCH_BITS +: EPOCH_BITS];
            // Ages wrap: compare with the next one's.
            key = shuffle ? (order[i] ^ random) * 32'h9E3779B1 : next_order - order[i];
            if (allowed && (!found || key > best)) begin
              found = 1;
              best = key;
              place = i;
            end
          end
        end
        if (found) begin
          served <= served + 1;
          wrong = served + 1 == fault_number ? fault : 0;
          if (wrong == DELAY || wrong == DUPLICATE) begin
            due[place] = now + fault_value;
          end else begin
            used[place] = 0;
            count = count - 1;
          end
          if (wrong != DELAY && wrong != DROP) begin
            left = BEATS;
            tag = waiting[place][TAG_AT +: TAG_BITS];
            if (wrong == CORRUPT) tag = tag ^ fault_value[TAG_BITS-1:0];
            address = (waiting[place][PAGE_AT +: PAGE_BITS] * 64'd1 * CODEWORDS
                + waiting[place][INDEX_AT +: INDEX_BITS]) * WORDS;
          end
        end
      end
      if (left != 0 && !gap_pattern[now[1:0]] && {1'b0, random[7:0]} >= gap) begin
        codeword_valid <= 1;
        codeword_payload[BEAT_TAG_AT +: TAG_BITS] <= tag;
        if (address < DEPTH) codeword_payload[BEAT_DATA_AT +: WORD_BITS] <= mem[address];
        else codeword_payload[BEAT_DATA_AT +: WORD_BITS] <= {WORD_BITS{1'b1}};
        codeword_payload[BEAT_LAST_AT] <= left == 1;
        left = left - 1;
        address = address + 1;
      end
    end

    // ------------------------------------------------------------ requests
    if (request_valid && request_ready) begin
      place = 0;
      for (i = 0; i < QUEUE; i = i + 1) if (!used[i]) place = i;
      used[place] = 1;
      count = count + 1;
      waiting[place] = request_payload;
      due[place] = now + latency + (jitter == 0 ? 0 : (random >> 4) % (jitter + 1));
      order[place] = next_order;
      next_order = next_order + 1;
    end
    request_ready <= count != QUEUE && !request_stall_pattern[now[1:0]]
        && {1'b0, random[15:8]} >= request_stall;

    if (rst) begin
      used = 0;
      count = 0;
      left = 0;
        request_ready <= 0;
      codeword_valid <= 0;
    end
  end

endmodule
