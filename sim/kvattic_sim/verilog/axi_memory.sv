// Behavioural device DRAM: the read channels of AXI4, INCR bursts, in order, one beat a cycle.
//
// A burst's first beat comes `latency` cycles after its address at the earliest.  A change of `load` reads the file
// dram.bin in the working directory, which is a sequence of records: 32 bits first word, 32 bits number of words (both
// big-endian), then the words, first byte most significant.  Addresses beyond the end are answered with DECERR, and so
// is every beat of the word `bad_word` while `bad` is set.

module axi_memory #(
    parameter WORD_BITS = 512,
    parameter WORDS = 1024,
    parameter LOG2_BYTES = 6,     // of a word
    parameter DEPTH = 16          // bursts that wait
) (
    input clk,
    input rst,
    input arvalid,
    output reg arready,
    input [63:0] araddr,
    input [7:0] arlen,
    output reg rvalid,
    input rready,
    output reg [WORD_BITS-1:0] rdata,
    output reg [1:0] rresp,
    output reg rlast,

    input [31:0] latency,
    input bad,
    input [31:0] bad_word,
    input load,
    output reg [31:0] load_errors
);

  localparam [1:0] DECERR = 2'b11;

  reg [WORD_BITS-1:0] mem [0:WORDS-1];
  reg [63:0] address [0:DEPTH-1];
  reg [7:0] length [0:DEPTH-1];
  reg [31:0] due [0:DEPTH-1];
  integer first, count, i, file, got;
  reg [31:0] now;
  reg [63:0] word;
  reg [8:0] left;
  reg loaded;
  reg [63:0] header;

  initial begin
    for (i = 0; i < WORDS; i = i + 1) mem[i] = 0;
    first = 0;
    count = 0;
    now = 0;
    word = 0;
    left = 0;
    loaded = 0;
    load_errors = 0;
    arready = 0;
    rvalid = 0;
    rdata = 0;
    rresp = 0;
    rlast = 0;
  end

  always @(posedge clk) begin
    now = now + 1;
    if (load != loaded) begin
      loaded = load;
      file = $fopen("dram.bin", "rb");
      if (file != 0) begin
        got = $fread(header, file);
        while (got == 8) begin
          if (header[63:32] + header[31:0] > WORDS) got = 0;
          else got = $fread(mem, file, header[63:32], header[31:0]);
          if (got != header[31:0] * (WORD_BITS / 8)) begin
            load_errors <= load_errors + 1;
            got = 0;
          end else got = $fread(header, file);
        end
        $fclose(file);
      end
    end

    if (arvalid && arready) begin
      i = (first + count) % DEPTH;
      address[i] = araddr;
      length[i] = arlen;
      due[i] = now + latency;
      count = count + 1;
    end
    if (rready || !rvalid) begin
      rvalid <= 0;
      if (left == 0 && count != 0 && !((now - due[first]) >> 31)) begin
        word = address[first] >> LOG2_BYTES;
        left = length[first] + 1;
        first = (first + 1) % DEPTH;
        count = count - 1;
      end
      if (left != 0) begin
        rvalid <= 1;
        rdata <= word < WORDS ? mem[word] : 0;
        rresp <= word < WORDS && !(bad && word == bad_word) ? 0 : DECERR;
        rlast <= left == 1;
        word = word + 1;
        left = left - 1;
      end
    end
    arready <= count < DEPTH - 1;

    if (rst) begin
      count = 0;
      left = 0;
      arready <= 0;
      rvalid <= 0;
    end
  end

endmodule
